-- One order after the other of those named in IDS, in an order of chance.
local ids = {}
for line in io.lines(os.getenv("IDS")) do
  ids[#ids + 1] = line
end

function request()
  return wrk.format("GET", wrk.path .. "/" .. ids[math.random(#ids)])
end
