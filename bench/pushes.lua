-- What bench/freshness.py lets wrk push: rows of quotes with new times, so many in a push, each connection with a pause in between.
-- Arguments: a file with the head of each request, rows in a push, milliseconds of the pause, seconds since 1970 of the first time.
local head, rows, pause, first
local turn = 0

local function list(value)
  local values = {}
  for row = 1, rows do
    values[row] = value(row)
  end
  return "[" .. table.concat(values, ",") .. "]"
end

local same = {}

function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  head = file:read("*a")
  file:close()
  rows, pause, first = tonumber(arguments[2]), tonumber(arguments[3]), tonumber(arguments[4])
  for _, name in ipairs({"open", "high", "low", "bid", "ask", "spread", "volume"}) do
    same[#same + 1] = '"' .. name .. '":' .. list(function() return "1.25" end)
  end
  same = table.concat(same, ",")
end

function delay()
  return pause
end

function request()
  turn = turn + 1
  -- Of one symbol, each push has a later time than the one before.
  local time = string.format("%d%06d", first + math.floor(turn / 1e6), turn % 1e6)
  local times = list(function() return time end)
  local symbols = list(function(row) return string.format('"PUSH-%d"', (turn * rows + row) % 5000) end)
  local closes = list(function() return turn end)
  local body = string.format(
    '{"push_source_name":"market_data_push_source","df":{"symbol":%s,"event_timestamp":%s,"created":%s,"close":%s,%s}}',
    symbols, times, times, closes, same
  )
  return string.format("%sContent-Length: %d\r\n\r\n%s", head, #body, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "failed": %d, "refused": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.timeout, errors.status
  ))
end
