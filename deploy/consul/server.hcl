# A Consul server. Run three (or five) of them, each on a machine of its own:
#   consul agent -config-file deploy/consul/server.hcl -bind "$ADDRESS" -node "$NAME"
# Keys as of Consul 1.8; later versions take them too, and prefer the TLS keys inside a `tls` block.

datacenter       = "dc1"
data_dir         = "/var/lib/consul"
server           = true
bootstrap_expect = 3
retry_join       = ["consul-1.example.net", "consul-2.example.net", "consul-3.example.net"]

# The HTTP API, for services on this machine and for those that name several servers in their registry URL. DNS answers on 8600.
client_addr = "0.0.0.0"

ports {
  https = 8501
  http  = -1
}

# Elections take about a second instead of five. Leave it out on slow or shared disks.
performance {
  raft_multiplier = 1
}

# Every watch of every service holds a connection. The default, 200 from one address, is met by some 25 services of one machine.
limits {
  http_max_conns_per_client = 1000
}

# Nothing is allowed that no token allows: see policy.hcl.
acl {
  enabled                  = true
  default_policy           = "deny"
  enable_token_persistence = true
}

# Clients prove who they are with a certificate that this authority signed (`consul tls ca create`, `consul tls cert create`).
ca_file         = "/etc/consul.d/ca.pem"
cert_file       = "/etc/consul.d/agent.pem"
key_file        = "/etc/consul.d/agent-key.pem"
verify_incoming = true
verify_outgoing = true

disable_update_check = true
