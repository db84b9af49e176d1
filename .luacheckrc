-- A script is read after the files that its first line names: their functions are globals of its file.
std = "lua51"
read_globals = {
  "redis", "cjson", "KEYS", "ARGV", "now", "time", "has_left", "is_as_seen", "erased_since", "is_open", "lease_left",
  "finish", "repeated", "serve", "turns", "turn_length", "turn", "changed",
}
local lua = "server/store/lua/"
local shared = {
  "prelude", "jobs/lease", "jobs/repeated", "adapters/change", "queue/turns", "access_keys/changed",
}
for _, used in ipairs(shared) do
  files[lua .. used .. ".lua"].ignore = { "211" } -- what it defines is used elsewhere
end
