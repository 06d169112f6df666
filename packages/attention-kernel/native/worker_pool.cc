// Owns the worker threads and the FIFO of jobs (see worker_pool.h).
#include "worker_pool.h"

#include <algorithm>
#include <utility>

namespace lamina {

/** Looks at whether others have finished, before sleeping until they have: what is left is a unit each at most. */
static constexpr int32_t kSpins = 100;
/** Claims that each thread could still make of what is left: many units at first, single ones at the end. */
static constexpr int32_t kClaimsPerThread = 4;

WorkerPool::WorkerPool(const Engine& engine, int32_t num_threads, std::function<void(uint32_t)> on_done)
    : engine_(engine), on_done_(std::move(on_done)), scratch_(size_t(num_threads)) {
  try {
    threads_.reserve(size_t(num_threads));
    for (int32_t worker = 0; worker < num_threads; worker++) threads_.emplace_back([this, worker] { run(worker); });
  } catch (...) {
    stop();
    throw;
  }
}

WorkerPool::~WorkerPool() { stop(); }

void WorkerPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void WorkerPool::run_here(const Job& job) {
  for (int32_t unit = 0; unit < job.step->num_store_units; unit++) run_store_unit(engine_, job, unit);
  const Division& division = engine_.division_of(job);
  const int32_t num_units = int32_t(division.units.size());
  const int32_t num_helpers = std::min(division.num_workers, num_threads()) - 1;
  if (num_helpers < 1) {
    run_attend_units(engine_, job, 0, num_units, caller_scratch_.view());
    return;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  jobs_.push_back(job);
  is_callers_ = true;
  phase_ = Phase::kAttend;
  next_unit_ = 0;
  finished_units_ = 0;
  num_units_ = num_units;
  for (int32_t i = 0; i < num_helpers; i++) changed_.notify_one();
  while (has_unit()) run_units(lock, caller_scratch_.view());
  const auto is_done = [this] { return finished_units_ == num_units_; };
  for (int32_t i = 0; i < kSpins && !is_done(); i++) {
    lock.unlock();
    std::this_thread::yield();
    lock.lock();
  }
  callers_done_.wait(lock, is_done);
  jobs_.pop_front();
  phase_ = Phase::kIdle;
  is_callers_ = false;
}

void WorkerPool::submit(Job job) {
  std::lock_guard<std::mutex> lock(mutex_);
  jobs_.push_back(std::move(job));
  if (phase_ != Phase::kIdle) return;
  advance();
  // advance() counts on its caller to work, and this one does not.
  if (phase_ != Phase::kIdle) changed_.notify_one();
}

void WorkerPool::advance() {
  int32_t num_workers = 0;
  for (;;) {
    if (phase_ == Phase::kAttend) {
      on_done_(jobs_.front().id);
      jobs_.pop_front();
      phase_ = Phase::kIdle;
    }
    if (phase_ == Phase::kIdle) {
      if (jobs_.empty()) return;
      phase_ = Phase::kStore;
      num_units_ = jobs_.front().step->num_store_units;
      num_workers = num_units_;
    } else {
      const Division& division = engine_.division_of(jobs_.front());
      phase_ = Phase::kAttend;
      num_units_ = int32_t(division.units.size());
      num_workers = division.num_workers;
    }
    next_unit_ = 0;
    finished_units_ = 0;
    if (num_units_ > 0) break;
  }
  for (int32_t i = 1; i < std::min(num_workers, num_threads()); i++) changed_.notify_one();
}

void WorkerPool::run(int32_t worker) {
  const Scratch& scratch = scratch_[size_t(worker)].view();
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || has_unit(); });
    if (stopping_) return;
    run_units(lock, scratch);
    if (finished_units_ < num_units_) continue;
    if (is_callers_)
      callers_done_.notify_one();
    else
      advance();
  }
}

void WorkerPool::run_units(std::unique_lock<std::mutex>& lock, const Scratch& scratch) {
  const int32_t begin = next_unit_;
  const int32_t end = begin + std::max(1, (num_units_ - begin) / (num_threads() * kClaimsPerThread));
  next_unit_ = end;
  const Phase phase = phase_;
  // The front job stays in place until all its units, these included, have finished.
  const Job& job = jobs_.front();
  lock.unlock();
  if (phase == Phase::kStore)
    for (int32_t unit = begin; unit < end; unit++) run_store_unit(engine_, job, unit);
  else
    run_attend_units(engine_, job, begin, end, scratch);
  lock.lock();
  finished_units_ += end - begin;
}

}  // namespace lamina
