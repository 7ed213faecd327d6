-- What bench/wrk.py lets wrk do: ask the requests of the first file in turn, and write each answer that is new into the second.
local requests, seen, turn = {}, {}, 0
local answers

function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  local length = file:read("*n", "*l")
  while length do
    requests[#requests + 1] = file:read(length)
    length = file:read("*n", "*l")
  end
  file:close()
  answers = assert(io.open(arguments[2], "wb"))
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function response(status, _, body)
  if not seen[body] then
    seen[body] = true
    answers:write(status, " ", #body, "\n", body)
    answers:flush()
  end
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "resets": %d, "timeouts": %d, "refused": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write, errors.timeout, errors.status
  ))
end
