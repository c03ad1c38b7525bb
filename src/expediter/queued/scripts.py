"""What happens in Redis in one step: Lua scripts that TemporaryOrders runs."""

# KEYS: set, commands, incarnation; then for each command its order, changes, and kept answer. ARGV: incarnation,
# when to look after them, seconds to keep them; then for each its token, the command, the order (empty: a change),
# what it is known by, the answer to keep (empty: none), and for how long (milliseconds). Returns the incarnation,
# and for each what was in its way; the incarnation alone if that is a newer one.
PUT = """
local now = redis.call('GET', KEYS[3]) or '0'
local mine = tonumber(ARGV[1])
if tonumber(now) > mine then return {now} end
if tonumber(now) < mine then redis.call('SET', KEYS[3], ARGV[1]) end
local function counting(key) -- what was refused, or is of an older incarnation, is in nobody's way
  local held = redis.call('GET', key)
  if not held or string.find(held, '{"state":"refused"', 1, true) == 1 then return nil end
  return tonumber(string.match(held, '"incarnation":(%d+)')) >= mine and held or nil
end
local found = {ARGV[1]}
for index = 1, (#KEYS - 3) / 3 do
  local order, changes, kept = unpack(KEYS, index * 3 + 1, index * 3 + 3)
  local token, command, document, known, answer, keep = unpack(ARGV, index * 6 - 2, index * 6 + 3)
  local before = answer ~= '' and counting(kept) or document ~= '' and counting(order) and 'taken' or ''
  if before == '' then
    if document == '' then
      redis.call('HSET', changes, token, known)
      redis.call('EXPIRE', changes, ARGV[3])
    else
      redis.call('SET', order, document, 'EX', ARGV[3])
    end
    redis.call('ZADD', KEYS[1], ARGV[2], token)
    redis.call('HSET', KEYS[2], token, command)
    if answer ~= '' then redis.call('SET', kept, answer, 'PX', keep) end
  end
  found[index + 1] = before
end
return found
"""

# KEYS: set, commands; then for each command its order, changes, and kept answer. ARGV: for each its token, what
# becomes of its order (stored, gone, deleted, or what is shown instead), milliseconds to keep that, and 1 where
# the answer is to be forgotten. A Redis that is full takes nothing new: then nothing is shown.
SETTLE = """
for index = 1, (#KEYS - 2) / 3 do
  local order, changes, kept = unpack(KEYS, index * 3, index * 3 + 2)
  local token, what, keep, forget = unpack(ARGV, index * 4 - 3, index * 4)
  redis.call('ZREM', KEYS[1], token)
  redis.call('HDEL', KEYS[2], token)
  redis.call('HDEL', changes, token)
  local held = redis.call('GET', order)
  local mine = held and string.find(held, '"token":"' .. token .. '"', 1, true)
  local pending = '{"state":"pending"'
  local shown = nil
  if what == 'stored' and mine and string.find(held, pending, 1, true) == 1 then
    shown = '{"state":"stored"' .. string.sub(held, #pending + 1)
  elseif string.sub(what, 1, 1) == '{' and (mine or not held) then
    shown = what
  end
  local gone = what == 'deleted' or (what == 'gone' and mine)
  if gone or (shown and redis.pcall('SET', order, shown, 'PX', keep).err) then redis.call('UNLINK', order) end
  if forget == '1' then redis.call('UNLINK', kept) end
end
"""

# KEYS: since when nothing was forgotten, set. ARGV: tokens. Returns the first, and when to look after each. (A Redis
# that is full refuses transactions, also such as only read.)
WAITING = "return {redis.call('GET', KEYS[1]), redis.call('ZMSCORE', KEYS[2], unpack(ARGV))}"
