// Owns the worker threads and the FIFO of jobs.
//
// Invariants
// 1. One job runs at a time, in two phases: store, then attend. A phase starts when every unit of the last has finished.
// 2. Units are claimed under the mutex, several at a time while many are left: a claim costs tens of nanoseconds, and
//    there are no claims of a past phase to guard against.
// 3. An idle worker sleeps on the condition variable; a phase wakes as many as its work is worth, and a worker that starts
//    one works on it itself.
// 4. A job of the caller's own is alone in the queue: the caller works on it too, and is woken when the last unit is another's.
// 5. `on_done` is called in FIFO order, from a worker, with the mutex held: it must only hand the id over.
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "attend_job.h"

namespace lamina {

class WorkerPool {
 public:
  /** Throws std::system_error or std::bad_alloc when threads or scratch cannot be had. */
  WorkerPool(const Engine& engine, int32_t num_threads, std::function<void(uint32_t)> on_done);
  /** Finishes the units in progress, drops queued jobs, joins. */
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  void submit(Job job);
  /** Does a job on the caller's thread, and on as many others as it is worth. No other may be submitted and not done. */
  void run_here(const Job& job);
  int32_t num_threads() const { return int32_t(scratch_.size()); }

 private:
  enum class Phase { kIdle, kStore, kAttend };

  void run(int32_t worker);
  /** Claims units of the front job and does them, unlocked meanwhile. */
  void run_units(std::unique_lock<std::mutex>& lock, const Scratch& scratch);
  void stop();
  /**
   * Moves to the next phase that has units, through finished jobs, and wakes all but one of the workers that it is worth.
   * The caller holds the mutex, and is or wakes that one.
   */
  void advance();
  bool has_unit() const { return phase_ != Phase::kIdle && next_unit_ < num_units_; }

  const Engine engine_;
  const std::function<void(uint32_t)> on_done_;
  std::vector<WorkerScratch> scratch_;
  const WorkerScratch caller_scratch_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  Phase phase_ = Phase::kIdle;
  int32_t next_unit_ = 0;
  int32_t finished_units_ = 0;
  int32_t num_units_ = 0;
  bool stopping_ = false;
  /** The front job is that of a caller who waits for it. */
  bool is_callers_ = false;
  std::condition_variable callers_done_;
  std::vector<std::thread> threads_;
};

}  // namespace lamina
