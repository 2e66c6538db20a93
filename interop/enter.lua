-- Enters a section that at most one may be inside of, and writes down who did, and beside how many others.
--
-- KEYS 1 how many are inside  2 list of entries
-- ARGV 1 who  2 index of the lease that let them in
local inside = redis.call("INCR", KEYS[1])
redis.call("RPUSH", KEYS[2], ARGV[1] .. " " .. ARGV[2] .. " " .. inside)
return inside
