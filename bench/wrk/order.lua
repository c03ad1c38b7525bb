-- One order with two priced lines (231 bytes), over keep-alive connections.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"customer_id":"customer_123","items":[' ..
  '{"item_id":"item_001","item_name":"Burger","quantity":2,"price":12.99},' ..
  '{"item_id":"item_002","item_name":"Fries","quantity":1,"price":3.49}]}'
