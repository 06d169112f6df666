// Owns the reading of what nats-server says (see server_lines.h).
#include "server_lines.h"

#include <strings.h>

#include <cstring>

namespace lamina {
namespace {

constexpr size_t kMaxFields = 5;

ServerLine of_kind(LineKind kind, size_t total_bytes = 0) {
  ServerLine line{};
  line.kind = kind;
  line.total_bytes = total_bytes;
  return line;
}

/** Decimal digits only, at most `limit`. */
bool read_number(const char* bytes, const Span& field, size_t limit, size_t* out) {
  size_t value = 0;
  if (field.length == 0 || field.length > 10) return false;
  for (size_t i = 0; i < field.length; i++) {
    const char digit = bytes[field.start + i];
    if (digit < '0' || digit > '9') return false;
    value = value * 10 + size_t(digit - '0');
  }
  *out = value;
  return value <= limit;
}

/** Fields between blanks in [begin, end). Returns how many; kMaxFields + 1 when there are more than fit. */
size_t split(const char* bytes, size_t begin, size_t end, Span* fields) {
  size_t count = 0;
  for (size_t at = begin; at < end;) {
    while (at < end && (bytes[at] == ' ' || bytes[at] == '\t')) at++;
    if (at == end) break;
    if (count == kMaxFields) return kMaxFields + 1;
    const size_t start = at;
    while (at < end && bytes[at] != ' ' && bytes[at] != '\t') at++;
    fields[count++] = Span{start, at - start};
  }
  return count;
}

bool has_verb(const char* bytes, size_t line_bytes, const char* verb) {
  const size_t length = strlen(verb);
  return line_bytes >= length && strncasecmp(bytes, verb, length) == 0;
}

/** MSG subject sid [reply] bytes, HMSG subject sid [reply] headerBytes bytes; then the payload and CR LF. */
ServerLine read_message(const char* bytes, size_t length, size_t line_bytes, bool has_headers) {
  Span fields[kMaxFields];
  const size_t first = has_headers ? 5 : 4;
  const size_t count = split(bytes, first, line_bytes, fields);
  const size_t without_reply = has_headers ? 4 : 3;
  if (count != without_reply && count != without_reply + 1) return of_kind(LineKind::kBad);
  size_t subscription = 0;
  size_t body_bytes = 0;
  size_t header_bytes = 0;
  if (!read_number(bytes, fields[1], UINT32_MAX, &subscription) ||
      !read_number(bytes, fields[count - 1], kMaxMessageBytes, &body_bytes) ||
      (has_headers && !read_number(bytes, fields[count - 2], body_bytes, &header_bytes)))
    return of_kind(LineKind::kBad);
  const size_t body_start = line_bytes + 2;
  const size_t total_bytes = body_start + body_bytes + 2;
  if (length < total_bytes) return of_kind(LineKind::kIncomplete, total_bytes);
  if (memcmp(bytes + total_bytes - 2, "\r\n", 2) != 0) return of_kind(LineKind::kBad);
  ServerLine line = of_kind(LineKind::kMessage, total_bytes);
  line.subscription = uint32_t(subscription);
  line.subject = fields[0];
  if (count == without_reply + 1) line.reply = fields[2];
  line.headers = Span{body_start, header_bytes};
  line.payload = Span{body_start + header_bytes, body_bytes - header_bytes};
  return line;
}

ServerLine with_text(LineKind kind, size_t verb_bytes, size_t line_bytes) {
  ServerLine line = of_kind(kind, line_bytes + 2);
  line.text = Span{verb_bytes, line_bytes - verb_bytes};
  return line;
}

}  // namespace

ServerLine read_server_line(const char* bytes, size_t length) {
  const size_t searched = length < kMaxLineBytes ? length : kMaxLineBytes;
  const void* found = memchr(bytes, '\r', searched);
  if (found == nullptr) return of_kind(searched == kMaxLineBytes ? LineKind::kBad : LineKind::kIncomplete);
  const size_t line_bytes = size_t(static_cast<const char*>(found) - bytes);
  if (line_bytes + 1 == length) return of_kind(LineKind::kIncomplete);
  if (bytes[line_bytes + 1] != '\n') return of_kind(LineKind::kBad);
  if (has_verb(bytes, line_bytes, "MSG ")) return read_message(bytes, length, line_bytes, false);
  if (has_verb(bytes, line_bytes, "HMSG ")) return read_message(bytes, length, line_bytes, true);
  if (has_verb(bytes, line_bytes, "PING")) return of_kind(LineKind::kPing, line_bytes + 2);
  if (has_verb(bytes, line_bytes, "PONG")) return of_kind(LineKind::kPong, line_bytes + 2);
  if (has_verb(bytes, line_bytes, "+OK")) return of_kind(LineKind::kOk, line_bytes + 2);
  if (has_verb(bytes, line_bytes, "INFO ")) return with_text(LineKind::kInfo, 5, line_bytes);
  if (has_verb(bytes, line_bytes, "-ERR")) return with_text(LineKind::kError, 4, line_bytes);
  return of_kind(LineKind::kBad);
}

}  // namespace lamina
