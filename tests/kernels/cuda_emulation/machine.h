// machine.h: runs a CUDA kernel on the CPU, block after block, every thread of a block on a stack of its own.
//
// A thread runs until it waits at a barrier or for its warp, then the next one runs: always in one order, ascending or
// descending. What a wrong kernel would get away with on some GPU is made to show: shared memory is NaN when a block
// begins, the target of an asynchronous copy is NaN until the copying thread has waited for it, threads that wait at
// different places or for one that has ended stop the launch with a message, and so do addresses that a GPU would
// refuse. Read next: cuda_runtime.h (the language), mma_warp.cuh (the instructions of tensor cores).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStack = 1 << 17;
constexpr unsigned kSharedAddress = 16;  // where a block's shared memory begins: not at a multiple of more
constexpr size_t kSharedByDefault = 48 << 10, kSharedAtMost = 227 << 10;  // bytes a block; the latter of sm_90

enum class State { Ready, AtBlock, AtWarp, Ended };

struct Place {
  const char* file;
  int line;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct alignas(16) Slot {
  unsigned char bytes[64];
};

struct Thread {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::Ended;
  Place place = {"", 0};
  unsigned mask = 0;
  dim3 index;
  int lane = 0;
  int turn = 0;  // which of the warp's two sets of slots is next
  std::vector<std::vector<Copy>> copies;  // groups that were committed, and at the end the open one
  std::vector<size_t> hidden;             // 16 bytes each that it wrote and wgmma may not read yet
};

class Machine {
 public:
  std::string problem;  // of the last launch
  bool descending = false;
  uint64_t conflicts = 0;  // times that a row of load_matrices lay in the banks of another one before it
  size_t shared_allowed = 0;  // by cudaFuncSetAttribute
  Thread* current = nullptr;
  uint64_t blocks_run = 0;
  std::function<void()> at_block_end = [] {};

  void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
    body_ = &body;
    const unsigned threads = block.x * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
      problem = "invalid grid";
    }
    if (threads == 0 || threads > 1024) problem = "invalid block";
    if (!problem.empty()) return;
    gridDim = grid;
    blockDim = block;
    shared_.assign((shared + sizeof(Slot) - 1) / sizeof(Slot) + 1, Slot{});
    shared_bytes_ = shared;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks && problem.empty(); ++i) {
      const uint64_t b = descending ? blocks - 1 - i : i;
      blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      run_block(block, threads);
    }
    if (!problem.empty()) threads_.clear();  // their stacks stand somewhere in the kernel
  }

  // ---- what threads call --------------------------------------------------------------------------------------------

  void wait(State state, Place place, unsigned mask = 0) {
    current->state = state;
    current->place = place;
    current->mask = mask;
    pause();
  }

  [[noreturn]] void fail(const std::string& text) {
    problem = text;
    pause();
    __builtin_unreachable();
  }

  Slot* slots(int turn) { return &slots_[(current - threads_.data()) / 32 * 64 + turn * 32]; }

  // Memory of a __shared__ variable, NaN where this block sees it for the first time.
  void shared(void* variable, size_t bytes) {
    if (std::find(seen_.begin(), seen_.end(), variable) != seen_.end()) return;
    seen_.push_back(variable);
    std::memset(variable, 0xff, bytes);
  }

  void* dynamic_shared() { return shared_.data(); }

  size_t number() const { return current - threads_.data(); }

  unsigned shared_address(const void* address) const {
    return kSharedAddress + static_cast<unsigned>(static_cast<const char*>(address) - begin());
  }

  // 16 bytes of shared memory that this thread has written: its next fence.proxy.async shows them to wgmma.
  void hide_from_products(const void* address) {
    const size_t pack = (static_cast<const char*>(address) - begin()) / 16;
    hidden_[pack] = true;
    current->hidden.push_back(pack);
  }

  void show_to_products() {
    for (const size_t pack : current->hidden) hidden_[pack] = false;
    current->hidden.clear();
  }

  const char* shared_for_products(unsigned address) {
    const size_t at = address - kSharedAddress;
    if (address < kSharedAddress || at >= shared_bytes_) fail("outside of shared memory: wgmma");
    if (hidden_[at / 16]) fail("wgmma reads what was written without fence.proxy.async");
    return begin() + at;
  }

  void check_shared(const void* address, size_t bytes, const char* what) {
    const char* at = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail(std::string("misaligned address: ") + what);
    if (at < begin() || at + bytes > begin() + shared_bytes_) fail(std::string("outside of shared memory: ") + what);
  }

 private:
  const char* begin() const { return reinterpret_cast<const char*>(shared_.data()); }

  __attribute__((noinline)) void pause() {
    if (_setjmp(current->at) == 0) _longjmp(scheduler_, 1);
  }

  static void enter();

  __attribute__((noinline)) void resume(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    if (_setjmp(scheduler_) != 0) return;
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  void prepare(unsigned threads) {
    if (threads_.size() != threads) threads_.clear(), threads_.resize(threads);
    for (Thread& thread : threads_) {
      if (thread.stack != nullptr) continue;
      thread.stack.reset(new char[kStack]);
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.get();
      thread.start.uc_stack.ss_size = kStack;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, &Machine::enter, 0);
    }
  }

  void run_block(dim3 block, unsigned threads) {
    prepare(threads);
    ++blocks_run;
    seen_.clear();
    hidden_.assign(shared_.size() * sizeof(Slot) / 16, false);
    std::memset(static_cast<void*>(shared_.data()), 0xff, shared_.size() * sizeof(Slot));
    slots_.resize((threads + 31) / 32 * 64);
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = threads_[t];
      thread.index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      thread.lane = t % 32;
      thread.turn = 0;
      thread.state = State::Ready;
      thread.copies.assign(1, {});
      thread.hidden.clear();
    }
    while (problem.empty()) {
      bool moved = false;
      const unsigned warps = (threads + 31) / 32;
      for (unsigned w = 0; w < warps && problem.empty(); ++w) {
        const unsigned warp = descending ? warps - 1 - w : w;
        while (problem.empty() && run_warp(warp * 32, std::min(threads, warp * 32 + 32))) moved = true;
      }
      if (problem.empty() && all({State::Ended})) return at_block_end();
      if (!problem.empty()) return;
      if (all({State::Ended, State::AtBlock})) {
        release(0, threads, State::AtBlock);
      } else if (!moved) {
        problem = "deadlock: " + standing();
      }
    }
  }

  // Runs each ready thread until it waits, then lets them go on if all wait for their warp. Whether any ran.
  bool run_warp(unsigned begin, unsigned end) {
    bool ran = false;
    for (unsigned i = begin; i < end && problem.empty(); ++i) {
      Thread& thread = threads_[descending ? begin + end - 1 - i : i];
      if (thread.state == State::Ready) resume(thread), ran = true;
    }
    unsigned waiting = 0;
    for (unsigned t = begin; t < end; ++t) waiting |= unsigned{threads_[t].state == State::AtWarp} << (t - begin);
    if (waiting == 0 || !problem.empty()) return ran;
    for (unsigned t = begin; t < end; ++t) {
      const bool waits = threads_[t].state == State::AtWarp;
      if (waits && threads_[t].mask != waiting) return ran;
    }
    release(begin, end, State::AtWarp);
    return true;
  }

  // Those that wait for the same.
  void release(unsigned begin, unsigned end, State state) {
    const Thread* first = nullptr;
    for (unsigned t = begin; t < end; ++t) {
      const Thread& thread = threads_[t];
      if (thread.state != state) continue;
      if (first == nullptr) first = &thread;
      if (thread.place.line != first->place.line || std::strcmp(thread.place.file, first->place.file) != 0) {
        problem = "threads wait at different places: " + standing();
        return;
      }
    }
    for (unsigned t = begin; t < end; ++t) {
      if (threads_[t].state == state) threads_[t].state = State::Ready;
    }
  }

  bool all(std::initializer_list<State> states) const {
    return std::all_of(threads_.begin(), threads_.end(), [&](const Thread& thread) {
      return std::find(states.begin(), states.end(), thread.state) != states.end();
    });
  }

  // How many threads stand where.
  std::string standing() const {
    std::map<std::string, int> count;
    for (const Thread& thread : threads_) {
      const std::string kind = thread.state == State::AtBlock ? "barrier " : "warp ";
      const std::string file = thread.place.file, name = file.substr(file.rfind('/') + 1);
      ++count[thread.state == State::Ended ? "ended" : kind + name + ":" + std::to_string(thread.place.line)];
    }
    std::string text;
    for (const auto& [place, threads] : count) {
      text += (text.empty() ? "" : ", ") + std::to_string(threads) + " at " + place;
    }
    return text;
  }

  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  std::vector<Thread> threads_;
  std::vector<Slot> slots_, shared_;
  size_t shared_bytes_ = 0;
  std::vector<bool> hidden_;  // of each 16 bytes of shared memory
  std::vector<void*> seen_;
};

inline Machine machine;

inline void Machine::enter() {
  for (;;) {
    (*machine.body_)();
    machine.current->state = State::Ended;
    machine.pause();
  }
}

// Gives `value` to the warp; returns all lanes' values once the lanes of `mask` are here.
template <typename T>
class Exchanged {
 public:
  Exchanged(const T& value, unsigned mask, Place place) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Thread& self = *machine.current;
    slots_ = machine.slots(self.turn);
    self.turn ^= 1;
    std::memcpy(slots_[self.lane].bytes, &value, sizeof value);
    machine.wait(State::AtWarp, place, mask);
  }
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots_[lane].bytes, sizeof value);
    return value;
  }

 private:
  Slot* slots_;
};

}  // namespace emulation
