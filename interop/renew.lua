-- What npm redfour 2.2 promises of renewLock: a lease whose index is still in the lock gets a new ttl. That version needs a Redis client of
-- its own; this is its contract, not its code.
--
-- KEYS 1 lock
-- ARGV 1 index, compared as a string  2 ttl in ms
local index = redis.call("HGET", KEYS[1], "index")
if not index then return "missing" end
if index ~= ARGV[1] then return "conflict" end
redis.call("PEXPIRE", KEYS[1], ARGV[2])
return "renewed"
