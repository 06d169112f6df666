// Owns one TCP connection to nats-server (see link.h).
#include "link.h"

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

namespace lamina {
namespace {

/** From here on a copy costs more than a call. */
constexpr size_t kDirectBytes = 32 * 1024;
/** What waits is sent when it is so much, without being asked. */
constexpr size_t kSendBytes = 256 * 1024;
/** Memory for what waits that is kept when nothing does. */
constexpr size_t kMaxKeptBytes = 4 * 1024 * 1024;
/** Less room than this is not worth a read. */
constexpr size_t kMinRoomBytes = 16 * 1024;
/** Reads before others of the event loop have their turn. */
constexpr int kMaxReads = 16;
#ifdef MSG_NOSIGNAL
constexpr int kSendFlags = MSG_NOSIGNAL;
#else
constexpr int kSendFlags = 0;
#endif

bool would_block(int code) { return code == EAGAIN || code == EWOULDBLOCK; }

int64_t now_us() {
  using std::chrono::steady_clock;
  return std::chrono::duration_cast<std::chrono::microseconds>(steady_clock::now().time_since_epoch()).count();
}

void set_option(int descriptor, int level, int name) {
  const int on = 1;
  setsockopt(descriptor, level, name, &on, sizeof on);
}

}  // namespace

Link::~Link() { close_descriptor(); }

void Link::close_descriptor() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
  is_open_ = false;
}

void Link::close(const std::string& failure) {
  if (!is_open_) return;
  is_open_ = false;
  failure_ = failure;
  unsent_.clear();
  sent_ = 0;
}

void Link::fail_by_socket_error() {
  int code = 0;
  socklen_t length = sizeof code;
  getsockopt(descriptor_, SOL_SOCKET, SO_ERROR, &code, &length);
  close(code == 0 ? "the connection failed" : strerror(code));
}

void Link::fail_by_errno(const char* what, int code) { close(std::string(what) + ": " + strerror(code)); }

bool Link::open(const std::string& address, int32_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0 || found == nullptr) {
    failure_ = "not a numeric address";
    return false;
  }
  descriptor_ = socket(found->ai_family, SOCK_STREAM, 0);
  int result = -1;
  int code = errno;
  if (descriptor_ >= 0) {
    fcntl(descriptor_, F_SETFD, FD_CLOEXEC);
    fcntl(descriptor_, F_SETFL, fcntl(descriptor_, F_GETFL) | O_NONBLOCK);
    set_option(descriptor_, IPPROTO_TCP, TCP_NODELAY);
#ifdef SO_NOSIGPIPE
    set_option(descriptor_, SOL_SOCKET, SO_NOSIGPIPE);
#endif
    result = connect(descriptor_, found->ai_addr, found->ai_addrlen);
    code = errno;
  }
  freeaddrinfo(found);
  if (result == 0 || (descriptor_ >= 0 && code == EINPROGRESS)) {
    is_open_ = true;
    return true;
  }
  failure_ = strerror(code);
  close_descriptor();
  return false;
}

void Link::write(const char* data, size_t length) {
  if (!is_open_) return;
  if (unsent_.size() - sent_ + length > kMaxUnsentBytes) {
    close("the server takes nothing");
    return;
  }
  unsent_.insert(unsent_.end(), data, data + length);
  if (unsent_.size() - sent_ >= kSendBytes) flush();
}

void Link::publish(const char* subject, size_t subject_length, const char* reply, size_t reply_length, const char* data,
                   size_t length) {
  char size[32];
  const int size_length = snprintf(size, sizeof size, " %zu\r\n", length);
  write("PUB ", 4);
  write(subject, subject_length);
  if (reply_length > 0) {
    write(" ", 1);
    write(reply, reply_length);
  }
  write(size, size_t(size_length));
  if (length < kDirectBytes || !is_open_) {
    write(data, length);
    write("\r\n", 2);
    return;
  }
  static char end[] = "\r\n";
  iovec parts[3] = {{unsent_.data() + sent_, unsent_.size() - sent_},
                    {const_cast<char*>(data), length},
                    {end, 2}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 3;
  ssize_t taken = sendmsg(descriptor_, &message, kSendFlags);
  if (taken < 0 && !would_block(errno) && errno != EINTR && errno != ENOTCONN) {
    fail_by_errno("write", errno);
    return;
  }
  size_t left = taken < 0 ? 0 : size_t(taken);
  size_t skipped[3];
  for (int i = 0; i < 3; i++) {
    skipped[i] = left < parts[i].iov_len ? left : parts[i].iov_len;
    left -= skipped[i];
  }
  sent_ += skipped[0];
  if (sent_ == unsent_.size()) {
    unsent_.clear();
    sent_ = 0;
  }
  write(data + skipped[1], length - skipped[1]);
  write(end + skipped[2], 2 - skipped[2]);
}

void Link::flush() {
  while (is_open_ && has_unsent()) {
    const ssize_t taken = send(descriptor_, unsent_.data() + sent_, unsent_.size() - sent_, kSendFlags);
    if (taken < 0) {
      if (errno == EINTR) continue;
      if (!would_block(errno) && errno != ENOTCONN) fail_by_errno("write", errno);
      break;
    }
    sent_ += size_t(taken);
  }
  if (sent_ == unsent_.size()) {
    unsent_.clear();
    sent_ = 0;
    if (unsent_.capacity() > kMaxKeptBytes) unsent_.shrink_to_fit();
  } else if (sent_ > unsent_.size() / 2) {
    unsent_.erase(unsent_.begin(), unsent_.begin() + std::ptrdiff_t(sent_));
    sent_ = 0;
  }
}

bool Link::make_room() {
  if (begin_ == end_ && !is_held_) begin_ = end_ = 0;
  const size_t message_bytes = message_bytes_ > 0 ? message_bytes_ : kMinRoomBytes;
  const bool fits = memory_ != nullptr && begin_ + message_bytes <= capacity_ && end_ + 1 <= capacity_ &&
                    (message_bytes_ > 0 || end_ + kMinRoomBytes <= capacity_);
  if (fits) return true;
  const size_t kept = end_ - begin_;
  // A line that is not complete, and has no known end, may grow to the longest.
  const size_t wanted = message_bytes_ > 0 ? message_bytes_ : kept + kMinRoomBytes;
  if (!is_held_ && memory_ != nullptr && wanted <= capacity_) {
    memmove(memory_, memory_ + begin_, kept);
  } else {
    size_t capacity = 0;
    char* memory = owner_->new_memory(wanted, &capacity);
    if (memory == nullptr || capacity < wanted) {
      close("no memory to receive into");
      return false;
    }
    if (kept > 0) memcpy(memory, memory_ + begin_, kept);
    memory_ = memory;
    capacity_ = capacity;
    is_held_ = false;
  }
  begin_ = 0;
  end_ = kept;
  return true;
}

int32_t Link::receive() {
  if (is_delivering_) return 0;
  int32_t num_messages = 0;
  for (int reads = 0; is_open_ && reads < kMaxReads; reads++) {
    if (!make_room()) break;
    const size_t room = capacity_ - end_;
    const ssize_t taken = recv(descriptor_, memory_ + end_, room, MSG_DONTWAIT);
    if (taken < 0) {
      if (errno == EINTR) continue;
      if (!would_block(errno)) fail_by_errno("read", errno);
      break;
    }
    if (taken == 0) {
      close("the server closed the connection");
      break;
    }
    end_ += size_t(taken);
    num_messages += deliver();
    if (size_t(taken) < room) break;
  }
  return num_messages;
}

int32_t Link::deliver() {
  int32_t num_messages = 0;
  is_delivering_ = true;
  while (is_open_ && begin_ < end_) {
    const char* bytes = memory_ + begin_;
    const ServerLine line = read_server_line(bytes, end_ - begin_);
    message_bytes_ = 0;
    if (line.kind == LineKind::kIncomplete) {
      message_bytes_ = line.total_bytes;
      break;
    }
    if (line.kind == LineKind::kBad) {
      close("what came is not the NATS protocol");
      break;
    }
    begin_ += line.total_bytes;
    if (line.kind == LineKind::kPing) {
      write("PONG\r\n", 6);
      flush();
    } else if (line.kind != LineKind::kOk) {
      if (line.kind == LineKind::kMessage) num_messages++;
      owner_->on_line(line, bytes);
    }
  }
  is_delivering_ = false;
  return num_messages;
}

int32_t Link::wait(int32_t timeout_us, int32_t spin_us) {
  flush();
  const int64_t begin_us = now_us();
  do {
    const int32_t num_messages = receive();
    if (num_messages > 0 || !is_open_ || is_delivering_) return num_messages;
  } while (now_us() - begin_us < spin_us);
  sleep(timeout_us);
  flush();
  return receive();
}

void Link::sleep(int32_t timeout_us) {
  pollfd watched{descriptor_, short(POLLIN | (has_unsent() ? POLLOUT : 0)), 0};
#ifdef __linux__
  const timespec timeout{timeout_us / 1'000'000, long(timeout_us % 1'000'000) * 1000};
  const int ready = ppoll(&watched, 1, &timeout, nullptr);
#else
  const int ready = poll(&watched, 1, (timeout_us + 999) / 1000);
#endif
  if (ready < 0 && errno != EINTR) fail_by_errno("poll", errno);
}

}  // namespace lamina
