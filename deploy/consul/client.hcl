# A Consul client agent: one on each machine that runs services of the mesh. They talk to it alone:
#   --registry 'consul://127.0.0.1:8500/tensorway?token_file=/etc/tensorway/consul-token'
# It asks their health from near by, and finds the servers by itself when some of them are away.
#   consul agent -config-file deploy/consul/client.hcl -bind "$ADDRESS" -node "$NAME"

datacenter = "dc1"
data_dir   = "/var/lib/consul"
server     = false
retry_join = ["consul-1.example.net", "consul-2.example.net", "consul-3.example.net"]

# Loopback only: whoever can reach it may use it, so far as their token goes.
client_addr = "127.0.0.1"

limits {
  http_max_conns_per_client = 1000
}

# A restart of the agent is no departure of its machine: services stay registered, and are checked again when it is back.
leave_on_terminate = false

acl {
  enabled                  = true
  default_policy           = "deny"
  enable_token_persistence = true
}

ca_file         = "/etc/consul.d/ca.pem"
cert_file       = "/etc/consul.d/agent.pem"
key_file        = "/etc/consul.d/agent-key.pem"
verify_outgoing = true

# Members with TLS want a certificate of whoever asks their health (gateways only where client_ca is set): the agent shows the one above,
# which tls_ca of the mesh must have signed. Without it, say check=ttl in the services' registry URL.
enable_agent_tls_for_checks = true

disable_update_check = true
