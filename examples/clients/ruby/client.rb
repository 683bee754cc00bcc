# Calls a Tensorway mesh from Ruby: one request, one stream, deadlines, error details.
#
#   make stubs LANG=ruby OUT=build/stubs/ruby
#   ruby -I build/stubs/ruby examples/clients/ruby/client.rb infer --values 1,2,3
#   ruby -I build/stubs/ruby examples/clients/ruby/client.rb generate --prompt "Why is the sky blue?"

require 'optparse'

require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'google/rpc/status_pb'
require 'grpc'
require 'tensorway/v1/inference_services_pb'

V1 = Tensorway::V1
DETAILS = { 'google.rpc.ErrorInfo' => Google::Rpc::ErrorInfo, 'google.rpc.BadRequest' => Google::Rpc::BadRequest,
            'google.rpc.RetryInfo' => Google::Rpc::RetryInfo }.freeze

options = { endpoint: 'localhost:8001', model: nil, values: [1.0, 2.0, 3.0], prompt: 'Why is the sky blue?', tokens: 40, timeout: 10.0, ca: nil }
OptionParser.new do |flags|
  flags.banner = 'usage: client.rb infer|generate [options]'
  flags.on('--endpoint HOST:PORT') { |value| options[:endpoint] = value }
  flags.on('--model NAME', 'default: identity, or smollm2-chat') { |value| options[:model] = value }
  flags.on('--values LIST', 'one row of numbers') { |value| options[:values] = value.split(',').map(&:to_f) }
  flags.on('--prompt TEXT') { |value| options[:prompt] = value }
  flags.on('--max-tokens N', Integer) { |value| options[:tokens] = value }
  flags.on('--timeout-s SECONDS', Float) { |value| options[:timeout] = value }
  flags.on('--ca FILE', 'talk TLS and trust this authority') { |value| options[:ca] = value }
end.parse!

credentials = options[:ca] ? GRPC::Core::ChannelCredentials.new(File.read(options[:ca])) : :this_channel_is_insecure
stub = V1::InferenceService::Stub.new(options[:endpoint], credentials)
deadline = Time.now + options[:timeout]

# One row: FP32, row-major, little-endian, no padding.
def infer(stub, options, deadline)
  row = options[:values]
  tensor = V1::Tensor.new(name: 'input', dtype: :DATA_TYPE_FP32, shape: [1, row.length], data: row.pack('e*'))
  response = stub.infer(V1::InferRequest.new(model: options[:model] || 'identity', inputs: [tensor]), deadline: deadline)
  response.outputs.each do |output|
    puts "#{output.name} [#{output.shape.to_a.join(', ')}]: #{output.data.unpack('e*').map { |value| format('%g', value) }.join(' ')}"
  end
end

# Messages come as they are made.
def generate(stub, options, deadline)
  request = V1::GenerateRequest.new(
    model: options[:model] || 'smollm2-chat', stop: V1::Stop.new(max_tokens: options[:tokens]), sampling: V1::Sampling.new(temperature: 0.0),
    chat: V1::Chat.new(messages: [V1::ChatMessage.new(role: 'user', content: options[:prompt])])
  )
  stub.generate(request, deadline: deadline).each do |message|
    print message.delta.text if message.event == :delta
    $stdout.flush
    warn "\n#{message.finished.usage.num_completion_tokens} tokens" if message.event == :finished
  end
  puts
end

# Why it failed, which field is at fault, and when to come back.
def show(error)
  warn "#{GRPC::Core::StatusCodes.constants.find { |name| GRPC::Core::StatusCodes.const_get(name) == error.code }}: #{error.details}"
  details = error.metadata['grpc-status-details-bin']
  return unless details

  Google::Rpc::Status.decode(details).details.each do |any|
    kind = DETAILS[any.type_url.delete_prefix('type.googleapis.com/')] or next
    detail = any.unpack(kind)
    warn "reason: #{detail.reason}" if kind == Google::Rpc::ErrorInfo
    detail.field_violations.each { |violation| warn "field: #{violation.field}" } if kind == Google::Rpc::BadRequest
    warn "retry after: #{detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9} s" if kind == Google::Rpc::RetryInfo
  end
end

begin
  case ARGV.shift
  when 'infer' then infer(stub, options, deadline)
  when 'generate' then generate(stub, options, deadline)
  else abort 'usage: client.rb infer|generate [options]; --help lists them'
  end
rescue GRPC::BadStatus => e
  show(e)
  exit 1
end
