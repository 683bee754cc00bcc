// Calls a Tensorway mesh from Go: one request, one stream, deadlines, error details.
//
//	make stubs LANG=go OUT=build/stubs/go      (its package is tensorway/v1)
//	go run . infer -values 1,2,3
//	go run . generate -prompt "Why is the sky blue?"
package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	v1 "tensorway/v1"
)

type options struct {
	endpoint, model, values, prompt, ca string
	maxTokens                           uint
	timeoutS                            float64
}

func main() {
	command := "help"
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	var o options
	flags := flag.NewFlagSet("client infer|generate", flag.ExitOnError)
	flags.StringVar(&o.endpoint, "endpoint", "localhost:8001", "the gateway, host:port")
	flags.StringVar(&o.model, "model", "", "default: identity, or smollm2-chat")
	flags.StringVar(&o.values, "values", "1,2,3", "one row of numbers")
	flags.StringVar(&o.prompt, "prompt", "Why is the sky blue?", "what is asked")
	flags.UintVar(&o.maxTokens, "max-tokens", 40, "most tokens of the answer")
	flags.Float64Var(&o.timeoutS, "timeout-s", 10, "deadline, seconds")
	flags.StringVar(&o.ca, "ca", "", "talk TLS and trust this authority")
	if command != "infer" && command != "generate" {
		flags.Usage()
		os.Exit(2)
	}
	if err := flags.Parse(os.Args[2:]); err != nil {
		os.Exit(2)
	}
	if err := run(command, o); err != nil {
		show(err)
		os.Exit(1)
	}
}

func run(command string, o options) error {
	transport := insecure.NewCredentials()
	if o.ca != "" {
		var err error
		if transport, err = credentials.NewClientTLSFromFile(o.ca, ""); err != nil {
			return err
		}
	}
	connection, err := grpc.Dial(o.endpoint, grpc.WithTransportCredentials(transport))
	if err != nil {
		return err
	}
	defer connection.Close()
	client := v1.NewInferenceServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(o.timeoutS*float64(time.Second)))
	defer cancel()
	if command == "infer" {
		return infer(ctx, client, o)
	}
	return generate(ctx, client, o)
}

// One row: FP32, row-major, little-endian, no padding.
func infer(ctx context.Context, client v1.InferenceServiceClient, o options) error {
	var data []byte
	words := strings.Split(o.values, ",")
	for _, word := range words {
		value, err := strconv.ParseFloat(word, 32)
		if err != nil {
			return err
		}
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(value)))
	}
	if o.model == "" {
		o.model = "identity"
	}
	tensor := &v1.Tensor{Name: "input", Dtype: v1.DataType_DATA_TYPE_FP32, Shape: []int64{1, int64(len(words))}, Data: data}
	response, err := client.Infer(ctx, &v1.InferRequest{Model: o.model, Inputs: []*v1.Tensor{tensor}})
	if err != nil {
		return err
	}
	for _, output := range response.Outputs {
		fmt.Printf("%s %s:", output.Name, strings.ReplaceAll(fmt.Sprint(output.Shape), " ", ", "))
		for i := 0; i+4 <= len(output.Data); i += 4 {
			fmt.Printf(" %g", math.Float32frombits(binary.LittleEndian.Uint32(output.Data[i:])))
		}
		fmt.Println()
	}
	return nil
}

// Messages come as they are made.
func generate(ctx context.Context, client v1.InferenceServiceClient, o options) error {
	if o.model == "" {
		o.model = "smollm2-chat"
	}
	maxTokens, temperature := uint32(o.maxTokens), float32(0)
	stream, err := client.Generate(ctx, &v1.GenerateRequest{
		Model:    o.model,
		Prompt:   &v1.GenerateRequest_Chat{Chat: &v1.Chat{Messages: []*v1.ChatMessage{{Role: "user", Content: o.prompt}}}},
		Stop:     &v1.Stop{MaxTokens: &maxTokens},
		Sampling: &v1.Sampling{Temperature: &temperature},
	})
	if err != nil {
		return err
	}
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			fmt.Println()
			return nil
		}
		if err != nil {
			return err
		}
		if delta := message.GetDelta(); delta != nil {
			fmt.Print(delta.Text)
		}
		if finished := message.GetFinished(); finished != nil {
			fmt.Fprintf(os.Stderr, "\n%d tokens\n", finished.Usage.NumCompletionTokens)
		}
	}
}

// The standard's names of the codes: Go's own are written otherwise.
var names = map[codes.Code]string{
	codes.Canceled: "CANCELLED", codes.Unknown: "UNKNOWN", codes.InvalidArgument: "INVALID_ARGUMENT", codes.DeadlineExceeded: "DEADLINE_EXCEEDED",
	codes.NotFound: "NOT_FOUND", codes.PermissionDenied: "PERMISSION_DENIED", codes.ResourceExhausted: "RESOURCE_EXHAUSTED",
	codes.FailedPrecondition: "FAILED_PRECONDITION", codes.Unimplemented: "UNIMPLEMENTED", codes.Internal: "INTERNAL",
	codes.Unavailable: "UNAVAILABLE", codes.Unauthenticated: "UNAUTHENTICATED",
}

// Why it failed, which field is at fault, and when to come back.
func show(err error) {
	failed, _ := status.FromError(err)
	name, known := names[failed.Code()]
	if !known {
		name = failed.Code().String()
	}
	fmt.Fprintf(os.Stderr, "%s: %s\n", name, failed.Message())
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Fprintf(os.Stderr, "reason: %s\n", detail.Reason)
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Fprintf(os.Stderr, "field: %s\n", violation.Field)
			}
		case *errdetails.RetryInfo:
			fmt.Fprintf(os.Stderr, "retry after: %g s\n", detail.RetryDelay.AsDuration().Seconds())
		}
	}
}
