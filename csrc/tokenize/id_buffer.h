// id_buffer.h: a growing array of ids, whose memory is neither cleared nor copied on its way to Python.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace megashear {

class IdBuffer {
 public:
  const int32_t* data() const { return memory_.get(); }
  size_t size() const { return size_; }
  void clear() { size_ = 0; }

  // The memory itself, for the caller to free().
  int32_t* release() { return memory_.release(); }

  // Room for `count` more ids; what is written there counts after added().
  int32_t* room(size_t count) {
    if (size_ + count > capacity_) grow(size_ + count);
    return memory_.get() + size_;
  }

  void added(size_t count) { size_ += count; }

  void add(const int32_t* ids, size_t count) {
    std::memcpy(room(count), ids, count * sizeof *ids);
    added(count);
  }

 private:
  struct Free {
    void operator()(int32_t* memory) const { std::free(memory); }
  };

  void grow(size_t wanted) {
    const size_t capacity = wanted > 2 * capacity_ ? wanted : 2 * capacity_;
    void* grown = std::realloc(memory_.get(), capacity * sizeof(int32_t));
    if (grown == nullptr) throw std::bad_alloc();
    static_cast<void>(memory_.release());
    memory_.reset(static_cast<int32_t*>(grown));
    capacity_ = capacity;
  }

  std::unique_ptr<int32_t[], Free> memory_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace megashear
