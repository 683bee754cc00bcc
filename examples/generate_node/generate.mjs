// Streams an answer of a language model, and goes on where it was when its connection breaks.
//
//   node generate.mjs "Why is the sky blue?"
//   node generate.mjs --drop-after 5 "Why is the sky blue?"    # breaks its own connection after 5 messages, and resumes
//
// The stubs are made of ../../protos when it starts: nothing is generated beforehand.

import { setTimeout as pause } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const MAX_ATTEMPTS = 5;

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    endpoint: { type: "string", default: process.env.TENSORWAY_ENDPOINT ?? "localhost:8001" },
    model: { type: "string", default: "smollm2-chat" },
    system: { type: "string" },
    "max-tokens": { type: "string", default: "100" },
    temperature: { type: "string", default: "0" },
    seed: { type: "string" },
    stop: { type: "string", multiple: true, default: [] },
    "timeout-s": { type: "string", default: "60" },
    "drop-after": { type: "string", default: "0" },
  },
});

// Ours, and google/api, which they import and protobufjs brings.
const includeDirs = ["../../protos", "node_modules/protobufjs"].map((folder) => fileURLToPath(new URL(folder, import.meta.url)));
// 64-bit numbers (sequence, seed) do not fit a JavaScript number: they come as strings.
const definition = protoLoader.loadSync("tensorway/v1/inference.proto", {
  includeDirs, keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).tensorway.v1;

/** The request that begins the stream. */
function firstRequest(prompt) {
  const messages = [{ role: "user", content: prompt }];
  if (options.system !== undefined) messages.unshift({ role: "system", content: options.system });
  return {
    model: options.model,
    chat: { messages },
    sampling: { temperature: Number(options.temperature), ...(options.seed !== undefined && { seed: options.seed }) },
    stop: { max_tokens: Number(options["max-tokens"]), strings: options.stop },
  };
}

/** What is known of the stream: enough to go on with it anywhere. */
const stream = { id: "", nextSequence: 0n, finished: null, numMessages: 0, firstTokenMs: 0, seed: "" };
const beganMs = performance.now();

/** Prints what a message adds. Every message of the stream comes once, whatever happens to connections. */
function take(message) {
  if (BigInt(message.sequence) !== stream.nextSequence) {
    throw new Error(`message ${message.sequence} came where ${stream.nextSequence} was due`);
  }
  stream.nextSequence += 1n;
  stream.numMessages += 1;
  if (message.event === "started") {
    stream.id = message.started.stream_id;
    stream.seed = message.started.seed;
  } else if (message.event === "delta") {
    stream.firstTokenMs ||= performance.now() - beganMs;
    process.stdout.write(message.delta.text);
  } else {
    stream.finished = message.finished;
  }
}

/** One call: begins the stream, or goes on with it. Resolves when the stream has ended; rejects with the call's status. */
async function attempt(request, deadline, dropAfter) {
  const client = new InferenceService(options.endpoint, grpc.credentials.createInsecure());
  const call = client.Generate(request, { deadline });
  const onInterrupt = () => call.cancel(); // the mesh frees the answer's place at once
  process.once("SIGINT", onInterrupt);
  try {
    for await (const message of call) {
      take(message);
      if (dropAfter && stream.numMessages >= dropAfter) {
        call.cancel();
        throw Object.assign(new Error("the connection was dropped on purpose"), { code: grpc.status.UNAVAILABLE });
      }
    }
  } finally {
    process.removeListener("SIGINT", onInterrupt);
    client.close();
  }
}

async function main() {
  const prompt = positionals.join(" ") || "Why is the sky blue?";
  const deadline = new Date(Date.now() + Number(options["timeout-s"]) * 1000);
  let request = firstRequest(prompt);
  let dropAfter = Number(options["drop-after"]);
  for (let number = 1; ; number += 1) {
    try {
      await attempt(request, deadline, dropAfter);
      break;
    } catch (error) {
      if (error.code !== grpc.status.UNAVAILABLE || number >= MAX_ATTEMPTS) throw error;
      await pause(100 * 2 ** (number - 1));
      dropAfter = 0;
      if (stream.id) {
        process.stderr.write(`\n[${error.message}; going on from message ${stream.nextSequence}]\n`);
        request = { resume: { stream_id: stream.id, next_sequence: stream.nextSequence.toString() } };
      }
    }
  }
  const { reason, usage, num_attempts: numAttempts } = stream.finished;
  const seconds = (performance.now() - beganMs) / 1000;
  process.stderr.write(
    `\n${usage.num_completion_tokens} tokens in ${seconds.toFixed(2)} s, the first after ${stream.firstTokenMs.toFixed(0)} ms; ` +
      `${reason}; attempts ${numAttempts}; seed ${stream.seed}\n`,
  );
}

main().catch((error) => {
  process.stderr.write(error.code === undefined ? `${error.stack}\n` : `\n${grpc.status[error.code]}: ${error.details ?? error.message}\n`);
  process.exitCode = error.code === grpc.status.CANCELLED ? 130 : 1;
});
