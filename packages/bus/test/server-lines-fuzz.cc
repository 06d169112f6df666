// Reads mutated streams of nats-server, as the native link does: `server-lines-fuzz <streams> <seed>`. Compiled and run by
// server-lines.test.ts.
//
// Every stream ends at memory that may not be read, so one byte too many ends the process. Of what is read: a line and its parts
// lie in the bytes that were given; the same bytes in two pieces say the same; bytes that are missing are waited for.
// Prints how many lines of each kind there were; the exit status is 1 and the stream is printed when something is wrong.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../native/server_lines.h"

using lamina::LineKind;
using lamina::read_server_line;
using lamina::ServerLine;
using lamina::Span;

namespace {

const std::vector<std::string> kSeeds = {
    "MSG a.b 1 5\r\nhello\r\n",
    "MSG a.b 4294967295 reply.here 11\r\nhello\r\nMSG \r\n",
    "HMSG c 2 r 12 15\r\nNATS/1.0\r\n\r\nxyz\r\n",
    "HMSG c 2 16 16\r\nNATS/1.0 503\r\n\r\n\r\n",
    "msg  d\t1  0\r\n\r\n",
    "PING\r\nPONG\r\n+OK\r\n",
    "INFO {\"max_payload\":9,\"connect_urls\":[\"10.0.0.1:4222\"]}\r\n",
    "-ERR 'Unknown Protocol Operation'\r\n",
};
const char kTelling[] = {0, ' ', '\t', '\r', '\n', '0', '9', '-', '.', '*', 'M', 'H', char(0x7f), char(0xff)};
const char* const kNumbers[] = {"0", "4294967295", "4294967296", "67174400", "67174401", "99999999999", "18446744073709551615"};
constexpr size_t kMaxStreamBytes = lamina::kMaxLineBytes + 4096;

uint32_t state = 0;

/** mulberry32. */
uint32_t below(uint32_t limit) {
  state += 0x6d2b79f5u;
  uint32_t mixed = (state ^ (state >> 15)) * (1u | state);
  mixed = (mixed + (mixed ^ (mixed >> 7)) * (61u | mixed)) ^ mixed;
  return (mixed ^ (mixed >> 14)) % limit;
}

const std::string& seed() { return kSeeds[below(uint32_t(kSeeds.size()))]; }

std::string mutated() {
  std::string bytes = seed() + seed();
  for (uint32_t changes = below(5); changes > 0; changes--) {
    const size_t at = below(uint32_t(bytes.size()) + 1);
    switch (below(8)) {
      case 0:
        if (at < bytes.size()) bytes[at] = char(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        if (at < bytes.size()) bytes[at] = kTelling[below(sizeof kTelling)];
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.insert(at, 1, kTelling[below(sizeof kTelling)]);
        break;
      case 4:
        bytes.insert(at, kNumbers[below(sizeof kNumbers / sizeof *kNumbers)]);
        break;
      case 5:
        bytes.insert(at, seed());
        break;
      case 6:
        bytes.erase(at, below(8));
        break;
      default:
        // Lines near the longest that is read.
        if (below(64) == 0) bytes.insert(at, lamina::kMaxLineBytes - 64 + below(128), 'x');
    }
  }
  if (bytes.size() > kMaxStreamBytes) bytes.resize(kMaxStreamBytes);
  return bytes;
}

/** Memory whose end is followed by a page that may not be read. */
class Guarded {
 public:
  Guarded() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t usable = (kMaxStreamBytes + page - 1) / page * page;
    void* memory = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + usable, page, PROT_NONE) != 0) abort();
    end_ = static_cast<char*>(memory) + usable;
  }
  ServerLine read(const char* bytes, size_t length) const {
    memcpy(end_ - length, bytes, length);
    return read_server_line(end_ - length, length);
  }

 private:
  char* end_;
};

bool is_within(const Span& span, size_t total) { return span.start <= total && span.length <= total - span.start; }

bool is_whole(const ServerLine& line) { return line.kind != LineKind::kIncomplete && line.kind != LineKind::kBad; }

const char* problem_of(const Guarded& guarded, const char* bytes, size_t length, const ServerLine& line) {
  const size_t cut = below(uint32_t(length));
  const ServerLine part = guarded.read(bytes, cut);
  if (!is_whole(line)) {
    if (is_whole(part)) return "whole in part, and not when more came";
    if (part.kind == LineKind::kBad && line.kind != LineKind::kBad) return "bad in part, and not when more came";
    if (line.kind == LineKind::kIncomplete && line.total_bytes != 0 && line.total_bytes <= length)
      return "waits for bytes that are there";
    return line.total_bytes > lamina::kMaxMessageBytes + lamina::kMaxLineBytes + 4 ? "too large" : nullptr;
  }
  if (line.total_bytes == 0 || line.total_bytes > length) return "longer than what was given";
  if (cut < line.total_bytes ? part.kind != LineKind::kIncomplete : part.kind != line.kind || part.total_bytes != line.total_bytes)
    return "another line in part";
  if (cut < line.total_bytes && part.total_bytes != 0 && part.total_bytes != line.total_bytes) return "waits for another size";
  for (const Span& span : {line.text, line.subject, line.reply, line.headers, line.payload})
    if (!is_within(span, line.total_bytes)) return "a part outside of its line";
  if (line.kind == LineKind::kMessage && (line.subject.length == 0 || line.payload.start + line.payload.length + 2 != line.total_bytes))
    return "a message that is not its subject and payload";
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const uint64_t num_streams = strtoull(argv[1], nullptr, 10);
  state = uint32_t(strtoul(argv[2], nullptr, 10));
  const Guarded guarded;
  uint64_t counts[size_t(LineKind::kBad) + 1] = {};
  for (uint64_t stream = 0; stream < num_streams; stream++) {
    const std::string bytes = mutated();
    for (size_t at = 0; at < bytes.size();) {
      const ServerLine line = guarded.read(bytes.data() + at, bytes.size() - at);
      counts[size_t(line.kind)]++;
      if (const char* problem = problem_of(guarded, bytes.data() + at, bytes.size() - at, line)) {
        printf("%s, at %zu of ", problem, at);
        for (const char byte : bytes) printf("%02x", uint8_t(byte));
        printf("\n");
        return 1;
      }
      if (!is_whole(line)) break;
      at += line.total_bytes;
    }
  }
  const char* separator = "{";
  const char* const names[] = {"incomplete", "message", "info", "ping", "pong", "ok", "error", "bad"};
  for (size_t kind = 0; kind < sizeof counts / sizeof *counts; kind++, separator = ",")
    printf("%s\"%s\":%llu", separator, names[kind], static_cast<unsigned long long>(counts[kind]));
  printf("}\n");
  return 0;
}
