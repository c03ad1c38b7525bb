-- Of ten requests six read one order of those named in IDS, three the first page of 20, and one places an order.
local ids = {}
for line in io.lines(os.getenv("IDS")) do
  ids[#ids + 1] = line
end
local json = { ["Content-Type"] = "application/json" }
local body = '{"customer_id":"customer_123","items":[' ..
  '{"item_id":"item_001","item_name":"Burger","quantity":2,"price":12.99},' ..
  '{"item_id":"item_002","item_name":"Fries","quantity":1,"price":3.49}]}'

function request()
  local chance = math.random(10)
  if chance == 1 then
    return wrk.format("POST", wrk.path, json, body)
  elseif chance <= 4 then
    return wrk.format("GET", wrk.path .. "?limit=20&offset=0")
  end
  return wrk.format("GET", wrk.path .. "/" .. ids[math.random(#ids)])
end
