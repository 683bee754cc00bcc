// Calls a Tensorway mesh from C++: one request, one stream, deadlines, error details.
//
//   make stubs LANG=cpp OUT=build/stubs/cpp
//   make -C examples/clients/cpp STUBS=$PWD/build/stubs/cpp
//   examples/clients/cpp/build/client infer --values 1,2,3
//   examples/clients/cpp/build/client generate --prompt "Why is the sky blue?"

#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tensorway/v1/inference.grpc.pb.h"

namespace v1 = tensorway::v1;

// A tensor's bytes are little-endian: on other machines each element would have to be turned round.
static_assert(std::endian::native == std::endian::little);

namespace {

using Options = std::map<std::string, std::string>;

constexpr const char* kNames[] = {"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
                                  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
                                  "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};

std::vector<float> Numbers(const std::string& list) {
  std::vector<float> row;
  std::stringstream words(list);
  for (std::string word; std::getline(words, word, ',');) row.push_back(std::stof(word));
  return row;
}

// Why it failed, which field is at fault, and when to come back.
int Show(const grpc::Status& status) {
  std::cerr << kNames[status.error_code()] << ": " << status.error_message() << "\n";
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return 1;
  for (const auto& any : rich.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest bad;
    google::rpc::RetryInfo retry;
    if (any.UnpackTo(&info)) std::cerr << "reason: " << info.reason() << "\n";
    if (any.UnpackTo(&bad)) {
      for (const auto& violation : bad.field_violations()) std::cerr << "field: " << violation.field() << "\n";
    }
    if (any.UnpackTo(&retry)) {
      std::cerr << "retry after: " << retry.retry_delay().seconds() + retry.retry_delay().nanos() / 1e9 << " s\n";
    }
  }
  return 1;
}

// One row: FP32, row-major, little-endian, no padding.
int Infer(v1::InferenceService::Stub& stub, const Options& options, grpc::ClientContext& context) {
  const std::vector<float> row = Numbers(options.at("values"));
  v1::InferRequest request;
  request.set_model(options.at("model").empty() ? "identity" : options.at("model"));
  v1::Tensor* tensor = request.add_inputs();
  tensor->set_name("input");
  tensor->set_dtype(v1::DATA_TYPE_FP32);
  tensor->add_shape(1);
  tensor->add_shape(static_cast<int64_t>(row.size()));
  tensor->set_data(row.data(), row.size() * sizeof(float));
  v1::InferResponse response;
  if (grpc::Status status = stub.Infer(&context, request, &response); !status.ok()) return Show(status);
  for (const auto& output : response.outputs()) {
    std::cout << output.name() << " [";
    for (int i = 0; i < output.shape_size(); ++i) std::cout << (i ? ", " : "") << output.shape(i);
    std::cout << "]:";
    std::vector<float> values(output.data().size() / sizeof(float));
    std::memcpy(values.data(), output.data().data(), output.data().size());
    for (float value : values) std::cout << " " << value;
    std::cout << "\n";
  }
  return 0;
}

// Messages come as they are made.
int Generate(v1::InferenceService::Stub& stub, const Options& options, grpc::ClientContext& context) {
  v1::GenerateRequest request;
  request.set_model(options.at("model").empty() ? "smollm2-chat" : options.at("model"));
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content(options.at("prompt"));
  request.mutable_stop()->set_max_tokens(std::stoul(options.at("max-tokens")));
  request.mutable_sampling()->set_temperature(0.0F);
  auto reader = stub.Generate(&context, request);
  for (v1::GenerateResponse response; reader->Read(&response);) {
    if (response.has_delta()) std::cout << response.delta().text() << std::flush;
    if (response.has_finished()) std::cerr << "\n" << response.finished().usage().num_completion_tokens() << " tokens\n";
  }
  grpc::Status status = reader->Finish();
  std::cout << "\n";
  return status.ok() ? 0 : Show(status);
}

}  // namespace

int main(int argc, char** argv) {
  Options options = {{"endpoint", "localhost:8001"}, {"model", ""}, {"values", "1,2,3"}, {"prompt", "Why is the sky blue?"},
                     {"max-tokens", "40"}, {"timeout-s", "10"}, {"ca", ""}};
  const std::string command = argc > 1 ? argv[1] : "";
  for (int i = 2; i + 1 < argc; i += 2) {
    auto option = options.find(std::string(argv[i]).substr(2));
    if (option == options.end()) {
      std::cerr << argv[i] << ": unknown; known are --endpoint --model --values --prompt --max-tokens --timeout-s --ca\n";
      return 2;
    }
    option->second = argv[i + 1];
  }
  auto credentials = grpc::InsecureChannelCredentials();
  if (!options["ca"].empty()) {
    std::ifstream file(options["ca"]);
    std::stringstream pem;
    pem << file.rdbuf();
    credentials = grpc::SslCredentials({pem.str(), "", ""});
  }
  auto stub = v1::InferenceService::NewStub(grpc::CreateChannel(options["endpoint"], credentials));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::system_clock::duration>(std::chrono::duration<double>(std::stod(options["timeout-s"]))));
  if (command == "infer") return Infer(*stub, options, context);
  if (command == "generate") return Generate(*stub, options, context);
  std::cerr << "usage: client infer|generate [--endpoint HOST:PORT] [--model NAME] [--values 1,2] [--prompt TEXT] [--timeout-s S] [--ca FILE]\n";
  return 2;
}
