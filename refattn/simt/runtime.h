// Between runtime.cpp and audit.cpp.
#pragma once
#include <string>
#include "include/simt.h"

namespace simt {
const size_t DYNAMIC = 227 << 10;      // the most shared memory that a block has on any device
const size_t MEMORY = 2 << 20;         // dynamic shared memory, then the static arrays with gaps between them

struct Audit {
  virtual void block(uint3 index, dim3 dim, const void* threads, size_t threads_bytes, const void* stacks, size_t stacks_bytes) = 0;
  virtual void shared(unsigned char* address, size_t bytes, unsigned element, const char* name) = 0;
  virtual void barrier() = 0;
  virtual void syncwarp(unsigned warp, unsigned lanes, bool whole) = 0;
  virtual void block_done() = 0;
  virtual void touch(const void* address, int bytes, bool write, bool atomic, void* pc) = 0;
};
extern Audit* audit;                   // null in a plain build
extern std::string error;
std::string name(const Thread& thread);
void stop();                           // ends the launch without an error; does not return to a kernel
}  // namespace simt
