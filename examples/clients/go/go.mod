module tensorway.example/client

go 1.22

require (
	google.golang.org/genproto/googleapis/rpc v0.0.0-20250603155806-513f23925822
	google.golang.org/grpc v1.73.0
	tensorway v0.0.0
)

// What `make stubs LANG=go` wrote; `go mod init tensorway` in that folder makes it a module.
replace tensorway => ../../../build/stubs/go
