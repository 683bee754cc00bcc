"""What is shipped in deploy/, run as it is shipped: the real Envoy, real gateways, kubectl's own kustomize."""
