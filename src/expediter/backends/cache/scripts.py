"""What runs inside the Redis of the shared cache: it compares and sets in one step (see redis.py for the keys).

Written in Lua, because Redis runs nothing else. `PREFIX` stands for what the names of all keys begin with; it is
put in once, so that no call has to bring the names along.
"""

from __future__ import annotations


def prefixed(script: str, prefix: str) -> str:
    """Return a script whose keys begin with `prefix`, which has no quotes and no backslashes in it."""
    return script.replace("PREFIX", prefix)


# Each script begins by making sure of the epoch: ARGV[1] is this server's run, ARGV[2] an epoch to set if there is
# none or if it comes from an earlier run.
_EPOCH_FIRST = """
local epoch = redis.call('GET', 'PREFIXorders:epoch')
if not epoch or string.sub(epoch, 1, #ARGV[1]) ~= ARGV[1] then
  epoch = ARGV[2]
  redis.call('SET', 'PREFIXorders:epoch', epoch)
end
"""
# KEYS: details. ARGV[3]: milliseconds to keep; ARGV[3 + n]: the version that KEYS[n] is about to have.
RETIRE_ORDERS = (
    _EPOCH_FIRST
    + """
for index, key in ipairs(KEYS) do
  local version = ARGV[3 + index]
  local held_version, held_epoch = string.match(
    redis.call('GETRANGE', key, 0, 127), '^{"version":(%d+),"epoch":"([^":]*)')
  if held_epoch ~= epoch or tonumber(held_version) < tonumber(version) then
    redis.call('SET', key, '{"version":' .. version .. ',"epoch":"' .. epoch .. ':0","order":null}', 'PX', ARGV[3])
  end
end
return epoch
"""
)
# KEYS[1]: a detail. ARGV[3]: milliseconds; ARGV[4]: the epoch it was read in; ARGV[5]: the standing's number then;
# ARGV[6]: version; ARGV[7]: value. The version counts before the number: who asked for the standing a moment ago
# may not put back what somebody has retired since.
STORE_ORDER = (
    _EPOCH_FIRST
    + """
if epoch ~= ARGV[4] then return 0 end
local version, held_epoch, number, order = string.match(
  redis.call('GETRANGE', KEYS[1], 0, 127), '^{"version":(%d+),"epoch":"([^":]*):(%d+)","order":(.)')
if held_epoch == epoch then
  local newer = tonumber(ARGV[6]) - tonumber(version)
  if newer < 0 or (newer == 0 and order ~= 'n' and tonumber(ARGV[5]) <= tonumber(number)) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[7], 'PX', ARGV[3])
return 1
"""
)
# ARGV[3]: the random end of a new list version; ARGV[4]: the standing's number, as far as the caller knows.
_HELD_LISTS = """
local version = redis.call('GET', 'PREFIXorders:list:version')
local held_epoch, number = string.match(version or '', '^(.*)%.(%d+)%.')
if held_epoch ~= epoch then number = '-1' end
"""
RETIRE_LISTS = (
    _EPOCH_FIRST
    + _HELD_LISTS
    + """
if tonumber(number) < tonumber(ARGV[4]) then number = ARGV[4] end
redis.call('SET', 'PREFIXorders:list:version', epoch .. '.' .. number .. '.' .. ARGV[3])
return epoch
"""
)
# The same; from ARGV[5] on: limit and offset of pages.
READ_PAGES = (
    _EPOCH_FIRST
    + _HELD_LISTS
    + """
if tonumber(number) < tonumber(ARGV[4]) then
  version = epoch .. '.' .. ARGV[4] .. '.' .. ARGV[3]
  redis.call('SET', 'PREFIXorders:list:version', version)
end
local found = {version}
for index = 5, #ARGV do
  found[index - 3] = redis.call('GET', 'PREFIXorders:list:' .. version .. ':' .. ARGV[index])
end
return found
"""
)
