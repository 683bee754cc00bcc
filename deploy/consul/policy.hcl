# What the token of a mesh's services must be allowed: everything of the mesh whose prefix is `tensorway`, and no more.
#   consul acl policy create -name tensorway -rules @deploy/consul/policy.hcl
#   consul acl token create -policy-name tensorway -description "tensorway services"
# Put the token into a file that only the services can read, and name it in their registry URL:
#   consul://127.0.0.1:8500/tensorway?token_file=/etc/tensorway/consul-token

service_prefix "tensorway-" {
  policy = "write"
}

key_prefix "tensorway/" {
  policy = "write"
}

# Sessions carry claims. They belong to a node; narrow it to your nodes' names where you can.
session_prefix "" {
  policy = "write"
}

# Rows of services come with their nodes.
node_prefix "" {
  policy = "read"
}
