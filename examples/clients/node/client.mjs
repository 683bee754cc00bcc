// Calls a Tensorway mesh from Node: one request, one stream, deadlines, error details.
//
//   npm ci --ignore-scripts
//   node client.mjs infer --values 1,2,3
//   node client.mjs generate --prompt "Why is the sky blue?"
//
// The stubs are made of the protos when it starts. For TypeScript's types: make stubs LANG=node.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    endpoint: { type: "string", default: "localhost:8001" },
    model: { type: "string" },
    values: { type: "string", default: "1,2,3" },
    prompt: { type: "string", default: "Why is the sky blue?" },
    "max-tokens": { type: "string", default: "40" },
    "timeout-s": { type: "string", default: "10" },
    ca: { type: "string" },
  },
});

// Ours, and google/api, which they import and protobufjs brings.
const includeDirs = ["../../../protos", "node_modules/protobufjs"].map((folder) => fileURLToPath(new URL(folder, import.meta.url)));
const loading = { includeDirs, longs: String, enums: String, defaults: true, oneofs: true };
const { InferenceService } = grpc.loadPackageDefinition(protoLoader.loadSync("tensorway/v1/inference.proto", loading)).tensorway.v1;
const credentials = options.ca ? grpc.credentials.createSsl(readFileSync(options.ca)) : grpc.credentials.createInsecure();
const client = new InferenceService(options.endpoint, credentials);
const deadline = () => new Date(Date.now() + Number(options["timeout-s"]) * 1000);

/** One row: FP32, row-major, little-endian, no padding. */
async function infer() {
  const row = options.values.split(",").map(Number);
  const data = Buffer.alloc(4 * row.length);
  row.forEach((value, index) => data.writeFloatLE(value, 4 * index));
  const request = {
    model: options.model ?? "identity",
    inputs: [{ name: "input", dtype: "DATA_TYPE_FP32", shape: [1, row.length], data }],
  };
  const response = await new Promise((resolve, reject) => {
    client.Infer(request, { deadline: deadline() }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
  for (const output of response.outputs) {
    const values = Array.from({ length: output.data.length / 4 }, (_, index) => output.data.readFloatLE(4 * index));
    console.log(`${output.name} [${output.shape.join(", ")}]: ${values.join(" ")}`);
  }
}

/** Messages come as they are made. */
async function generate() {
  const request = {
    model: options.model ?? "smollm2-chat",
    chat: { messages: [{ role: "user", content: options.prompt }] },
    stop: { maxTokens: Number(options["max-tokens"]) },
    sampling: { temperature: 0 },
  };
  for await (const message of client.Generate(request, { deadline: deadline() })) {
    if (message.event === "delta") process.stdout.write(message.delta.text);
    if (message.event === "finished") process.stderr.write(`\n${message.finished.usage.numCompletionTokens} tokens\n`);
  }
  process.stdout.write("\n");
}

/** Why it failed, which field is at fault, and when to come back: google.rpc.Status, in a trailer. */
function show(error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  const [details] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (details === undefined) return;
  for (const any of fields(details).filter(([number]) => number === 3)) {
    const [url, value] = [fields(any[1]).find(([number]) => number === 1)[1].toString(), fields(any[1]).find(([number]) => number === 2)?.[1]];
    const parts = value ? fields(value) : [];
    if (url.endsWith("google.rpc.ErrorInfo")) console.error(`reason: ${parts.find(([number]) => number === 1)[1]}`);
    if (url.endsWith("google.rpc.BadRequest")) {
      for (const [, violation] of parts) console.error(`field: ${fields(violation).find(([number]) => number === 1)[1]}`);
    }
  }
}

/** The length-delimited fields of a protobuf message, [number, bytes]: two levels of them are all that an error's details need. */
function fields(message) {
  const found = [];
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      const byte = message[at++];
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < message.length) {
    const key = varint();
    if ((key & 7) === 0) varint();
    else if ((key & 7) === 2) {
      const length = varint();
      found.push([key >>> 3, message.subarray(at, at + length)]);
      at += length;
    } else throw new Error(`wire type ${key & 7} in error details`);
  }
  return found;
}

const commands = { infer, generate };
const command = commands[positionals[0]];
if (command === undefined) {
  console.error("usage: node client.mjs infer|generate [--endpoint HOST:PORT] [--model NAME] [--values 1,2] [--prompt TEXT] [--timeout-s S] [--ca FILE]");
  process.exitCode = 2;
} else {
  await command().catch((error) => {
    if (error.code === undefined) throw error;
    show(error);
    process.exitCode = 1;
  });
}
client.close();
