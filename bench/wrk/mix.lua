-- The first page of 20, and one order out of SEEDED, by turns of chance; one request in ten places an order.
local seeded = tonumber(os.getenv("SEEDED"))
local path = os.getenv("ORDERS_PATH")
local id = os.getenv("ID_FORMAT")
local body = '{"customer_id":"customer_123","items":[' ..
  '{"item_id":"item_001","item_name":"Burger","quantity":2,"price":12.99},' ..
  '{"item_id":"item_002","item_name":"Fries","quantity":1,"price":3.49}]}'
local json = { ["Content-Type"] = "application/json" }

function init(args)
  math.randomseed(os.time())
end

function request()
  local chance = math.random(10)
  if chance == 1 then
    return wrk.format("POST", path, json, body)
  elseif chance <= 4 then
    return wrk.format("GET", path .. "?limit=20&offset=0")
  end
  return wrk.format("GET", path .. "/" .. string.format(id, math.random(seeded)))
end
