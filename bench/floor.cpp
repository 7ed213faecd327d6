// The least that an online read can cost: HMGET per symbol, pipelined, and each value decoded; no HTTP, no client, no Python.
//
//   floor answers PORT < requests            each request's answer, as JSON, a line each
//   floor run PORT THREADS IN_FLIGHT SECONDS values|json < requests
//
// Standard input, words with blanks between them: the names of the columns; a line with the number of each column's view; the fields of
// the columns, in hex; the fields of the views' event times, in hex; then a line for each request, with pairs of a symbol and its key in hex.
//
// Each thread has one connection to Redis and IN_FLIGHT requests on their way. It reads replies where they lie in the buffer, as they
// come. `values` leaves numbers in an array; `json` also writes the body that a feature server answers with, numbers in the fewest digits
// that give them again. What `run` prints is one JSON object: requests_per_s, p50_ms, p99_ms.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;
using std::string;
using std::vector;

[[noreturn]] static void fail(const string& why) {
  std::cerr << "floor: " << why << "\n";
  exit(1);
}

static string unhex(const string& digits) {
  string bytes;
  for (size_t at = 0; at + 1 < digits.size(); at += 2) bytes += char(stoi(digits.substr(at, 2), nullptr, 16));
  return bytes;
}

struct Request {
  vector<string> symbols;
  string commands;
};

struct Asked {
  vector<string> names;
  vector<int> view_of;
  size_t views = 0;
  vector<Request> requests;

  Asked() {
    names = words();
    for (const string& word : words()) view_of.push_back(stoi(word));
    vector<string> fields = words(), times = words();
    views = times.size();
    string tail;
    for (const vector<string>* part : {&fields, &times})
      for (const string& field : *part) tail += bulk(unhex(field));
    if (names.size() != view_of.size() || names.size() != fields.size()) fail("columns, views and fields differ in number");
    for (vector<string> pairs = words(); !pairs.empty(); pairs = words()) {
      Request request;
      for (size_t at = 0; at + 1 < pairs.size(); at += 2) {
        request.symbols.push_back(pairs[at]);
        request.commands += "*" + std::to_string(names.size() + views + 2) + "\r\n$5\r\nHMGET\r\n" + bulk(unhex(pairs[at + 1])) + tail;
      }
      requests.push_back(request);
    }
    if (requests.empty()) fail("no requests");
  }

  static vector<string> words() {
    string line, word;
    vector<string> found;
    std::getline(std::cin, line);
    std::istringstream in(line);
    while (in >> word) found.push_back(word);
    return found;
  }

  static string bulk(const string& bytes) { return "$" + std::to_string(bytes.size()) + "\r\n" + bytes + "\r\n"; }
};

struct Value {
  enum Kind : uint8_t { null, real, whole } kind;
  union {
    double number;
    int64_t integer;
  };
};

static int64_t varint(const char*& at, const char* end) {
  uint64_t value = 0;
  for (int shift = 0; at < end; shift += 7) {
    uint8_t byte = *at++;
    value |= uint64_t(byte & 127) << shift;
    if (byte < 128) return int64_t(value);
  }
  fail("a value is cut off");
}

// Feast's Value: what these views hold is a double, a whole number, or nothing.
static Value value_of(const char* at, size_t size) {
  Value value{Value::null, {0}};
  if (size == 9 && *at == 0x29) {
    value.kind = Value::real;
    memcpy(&value.number, at + 1, 8);
  } else if (size > 1 && (*at == 0x18 || *at == 0x20)) {
    const char* from = at + 1;
    value.kind = Value::whole;
    value.integer = varint(from, at + size);
  } else if (size) {
    fail("a value is neither a double nor a whole number");
  }
  return value;
}

static int64_t seconds_of(const char* at, size_t size) {
  if (!size) return 0;
  const char* from = at + 1;
  if (*at != 0x08) fail("an event time is not in whole seconds");
  int64_t seconds = varint(from, at + size);
  if (from != at + size) fail("an event time is not in whole seconds");
  return seconds;
}

// A request's values, column after column.
struct Rows {
  vector<Value> values;
  vector<int64_t> times;
};

class Redis {
 public:
  Redis(const Asked& asked, int port) : asked(asked), held(1 << 16) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1;
    sock = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(sock, reinterpret_cast<sockaddr*>(&address), sizeof address)) fail("Redis does not answer");
  }

  void send(const string& commands) {
    for (size_t sent = 0; sent < commands.size();) {
      ssize_t more = write(sock, commands.data() + sent, commands.size() - sent);
      if (more <= 0) fail("Redis has gone");
      sent += more;
    }
  }

  // Decode what has come of a request's reply; return whether that is all of it.
  bool decode(size_t rows, Rows& into) {
    size_t columns = asked.names.size(), width = columns + asked.views;
    into.values.resize(columns * rows);
    into.times.resize(asked.views * rows);
    while (row < rows) {
      if (column < 0) {
        if (!line('*')) return false;
        if (size_t(number) != width) fail("a reply has another number of values");
        column = 0;
      }
      for (; column < int(width); column++) {
        if (size_wanted < 0) {
          if (!line('$')) return false;
          size_wanted = number + 1;  // 0: nothing is stored
        }
        size_t size = size_wanted ? size_wanted - 1 : 0;
        if (size_wanted && last - first < size + 2) return false;
        const char* at = held.data() + first;
        if (column < int(columns))
          into.values[column * rows + row] = value_of(at, size);
        else
          into.times[(column - columns) * rows + row] = seconds_of(at, size);
        first += size_wanted ? size + 2 : 0;
        size_wanted = -1;
      }
      column = -1;
      row++;
    }
    row = 0;
    return true;
  }

  // Wait for more of the replies.
  void receive() {
    if (first) {
      memmove(held.data(), held.data() + first, last - first);
      last -= first;
      first = 0;
    }
    if (last == held.size()) held.resize(held.size() * 2);
    ssize_t more = recv(sock, held.data() + last, held.size() - last, 0);
    if (more <= 0) fail("Redis has gone");
    last += more;
  }

  ~Redis() { close(sock); }

 private:
  // Take a line such as *48 or $9 or $-1; return whether there is one.
  bool line(char kind) {
    const char *at = held.data() + first, *end = held.data() + last;
    const char* stop = static_cast<const char*>(memchr(at, '\n', end - at));
    if (!stop) return false;
    if (*at != kind) fail("Redis says " + string(at, stop));
    std::from_chars(at + 1, stop, number);
    first = stop + 1 - held.data();
    return true;
  }

  const Asked& asked;
  int sock;
  vector<char> held;
  size_t first = 0, last = 0, row = 0;
  long number = 0, size_wanted = -1;
  int column = -1;
};

class Json {
 public:
  explicit Json(const Asked& asked) : asked(asked) {
    for (const string& name : asked.names) metadata += ",\"" + name + "\"";
    metadata = "],\"metadata\":{\"feature_names\":[\"symbol\"" + metadata + "]}}";
  }

  const string& of(const Request& request, const Rows& rows) {
    size_t count = request.symbols.size();
    string statuses = "],\"statuses\":[" + repeated("\"PRESENT\"", count) + "],\"event_timestamps\":[";
    body = "{\"results\":[{\"values\":[";
    for (size_t row = 0; row < count; row++) body += (row ? ",\"" : "\"") + request.symbols[row] + "\"";
    body += statuses + repeated("\"1970-01-01T00:00:00Z\"", count) + "]}";
    vector<string> ends;
    for (size_t view = 0; view < asked.views; view++) {
      string times;
      for (size_t row = 0; row < count; row++) times += (row ? ",\"" : "\"") + moment(rows.times[view * count + row]) + "\"";
      ends.push_back(statuses + times + "]}");
    }
    for (size_t column = 0; column < asked.names.size(); column++) {
      body += ",{\"values\":[";
      size_t used = body.size();
      body.resize(used + 32 * count);
      char* at = body.data() + used;
      for (size_t row = 0; row < count; row++) {
        if (row) *at++ = ',';
        const Value& value = rows.values[column * count + row];
        if (value.kind == Value::real)
          at = real(at, value.number);
        else if (value.kind == Value::whole)
          at = std::to_chars(at, at + 31, value.integer).ptr;
        else
          at = static_cast<char*>(memcpy(at, "null", 4)) + 4;
      }
      body.resize(at - body.data());
      body += ends[asked.view_of[column]];
    }
    return body += metadata;
  }

 private:
  static char* real(char* from, double number) {
    char* at = std::to_chars(from, from + 29, number).ptr;
    if (std::all_of(from, at, [](char c) { return c == '-' || (c >= '0' && c <= '9'); })) {
      *at++ = '.';
      *at++ = '0';
    }
    return at;
  }

  static string repeated(const string& item, size_t count) {
    string items = item;
    items.reserve((item.size() + 1) * count);
    for (size_t row = 1; row < count; row++) items += "," + item;
    return items;
  }

  const string& moment(int64_t seconds) {
    if (seconds != known) {
      char text[32];
      time_t time = known = seconds;
      tm parts;
      strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&time, &parts));
      shown = text;
    }
    return shown;
  }

  const Asked& asked;
  string metadata, body, shown;
  int64_t known = INT64_MIN;
};

static void work(const Asked& asked, int port, size_t in_flight, double seconds, bool json, size_t offset, vector<double>& took) {
  Redis redis(asked, port);
  Json writer(asked);
  Rows rows;
  string commands;
  std::deque<std::pair<size_t, Clock::time_point>> waiting;
  size_t turn = offset;
  auto end = Clock::now() + std::chrono::duration<double>(seconds);
  auto ask = [&] {
    const Request& request = asked.requests[++turn % asked.requests.size()];
    waiting.emplace_back(turn % asked.requests.size(), Clock::now());
    commands += request.commands;
  };
  while (waiting.size() < in_flight) ask();
  while (!waiting.empty()) {
    if (!commands.empty()) redis.send(commands);
    commands.clear();
    redis.receive();
    while (!waiting.empty() && redis.decode(asked.requests[waiting.front().first].symbols.size(), rows)) {
      if (json) writer.of(asked.requests[waiting.front().first], rows);
      auto now = Clock::now();
      took.push_back(std::chrono::duration<double, std::milli>(now - waiting.front().second).count());
      waiting.pop_front();
      if (now < end) ask();
    }
  }
}

int main(int count, char** arguments) {
  string what = count > 2 ? arguments[1] : "";
  if (!(what == "answers" && count == 3) && !(what == "run" && count == 7)) fail("see the head of floor.cpp");
  int port = atoi(arguments[2]);
  Asked asked;
  if (what == "answers") {
    Redis redis(asked, port);
    Json writer(asked);
    Rows rows;
    for (const Request& request : asked.requests) {
      redis.send(request.commands);
      do redis.receive();
      while (!redis.decode(request.symbols.size(), rows));
      std::cout << writer.of(request, rows) << "\n";
    }
    return 0;
  }
  size_t threads = atoi(arguments[3]), in_flight = atoi(arguments[4]);
  double seconds = atof(arguments[5]);
  vector<vector<double>> took(threads);
  vector<std::thread> running;
  auto started = Clock::now();
  for (size_t number = 0; number < threads; number++)
    running.emplace_back([&, number] {
      work(asked, port, in_flight, seconds, string(arguments[6]) == "json", number * 7, took[number]);
    });
  for (std::thread& thread : running) thread.join();
  double passed = std::chrono::duration<double>(Clock::now() - started).count();
  vector<double> all;
  for (const vector<double>& of_one : took) all.insert(all.end(), of_one.begin(), of_one.end());
  std::sort(all.begin(), all.end());
  printf("{\"requests_per_s\": %f, \"p50_ms\": %f, \"p99_ms\": %f}\n", all.size() / passed, all[all.size() / 2], all[all.size() * 99 / 100]);
}
