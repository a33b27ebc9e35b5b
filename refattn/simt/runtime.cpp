// Runs a grid of CUDA threads as fibers, one at a time. A thread runs until it waits (at a barrier, in a warp operation) or returns; when no
// thread can run, either all wait at the same barrier, which then opens, or the kernel is wrong, and that is said with its lines.
#include <algorithm>
#include <cstdarg>
#include <random>
#include <string>
#include <vector>
#include <sys/mman.h>
#include "include/simt.h"
#include "runtime.h"
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace simt {
const Thread* current;
alignas(4096) unsigned char memory[MEMORY];
Audit* audit;
std::string error;

namespace {
enum State { RUNNING, AT_BARRIER, IN_WARP, RETURNED };
struct Place { const char* file; int line; };
#if defined(__x86_64__) || defined(__aarch64__)
using Context = void*;                                   // the stack pointer; everything else is saved on the stack
#else
using Context = ucontext_t;
#endif
struct Fiber {
  Thread thread;
  State state;
  Context context;
  Place at;                                              // where it waits
  int kind, predicate, result;                           // barrier
  Operation operation; unsigned mask; uint64_t value, got; int parameter, width; bool defined; Whole whole;   // warp operation
};
struct Warp { unsigned alive, waiting; };

const size_t STACK = 128 << 10;
const char* const NAMES[] = {"__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                             "__ballot_sync", "__any_sync", "__all_sync", "a wmma function"};
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* running;
Context scheduler;
char* stacks;
bool failed;
const Entry* kernel;
void** kernel_arguments;
std::vector<std::pair<const Shared*, unsigned char*>> arrays;   // static shared arrays of the running block
unsigned char* free_memory;
size_t dynamic_bytes, static_bytes;

// --- switching ----------------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void simt_switch(Context* from, Context to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
#elif defined(__aarch64__)
extern "C" void simt_switch(Context* from, Context to);
asm(R"(
.text
.type simt_switch, %function
simt_switch:
  stp x29, x30, [sp, -160]!
  stp x19, x20, [sp, 16]; stp x21, x22, [sp, 32]; stp x23, x24, [sp, 48]; stp x25, x26, [sp, 64]; stp x27, x28, [sp, 80]
  stp d8, d9, [sp, 96]; stp d10, d11, [sp, 112]; stp d12, d13, [sp, 128]; stp d14, d15, [sp, 144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, 16]; ldp x21, x22, [sp, 32]; ldp x23, x24, [sp, 48]; ldp x25, x26, [sp, 64]; ldp x27, x28, [sp, 80]
  ldp d8, d9, [sp, 96]; ldp d10, d11, [sp, 112]; ldp d12, d13, [sp, 128]; ldp d14, d15, [sp, 144]
  ldp x29, x30, [sp], 160
  ret
)");
#else
void simt_switch(Context* from, Context& to) { swapcontext(from, &to); }
#endif

void wait() { simt_switch(&running->context, scheduler); }

void first() {
  kernel->run(kernel->kernel, kernel_arguments);
  running->state = RETURNED;
  wait();
  __builtin_trap();
}

void prepare(Fiber& fiber, char* stack) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + STACK - 16);
  *--top = nullptr;                                      // as if `first` had been called: the stack is aligned, and ends here
  *--top = reinterpret_cast<void*>(first);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.context = top;
#elif defined(__aarch64__)
  void** top = reinterpret_cast<void**>(stack + STACK - 160);
  std::memset(top, 0, 160);
  top[1] = reinterpret_cast<void*>(first);
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, first, 0);
#endif
}

void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
  simt_switch(&scheduler, fiber.context);
  current = nullptr;
}

std::string place(const Fiber& fiber) { return std::string(fiber.at.file) + ":" + std::to_string(fiber.at.line); }

// --- warp operations ----------------------------------------------------------------------------------------------------------------------

// What `lane` gets, once all of `live` have come; false where the device leaves the value undefined.
bool combine(const Fiber* lanes, unsigned live, unsigned lane) {
  const Fiber& f = lanes[lane];
  uint64_t& got = const_cast<Fiber&>(f).got;
  const int start = lane & ~(f.width - 1), end = start + f.width;      // the segment of a shuffle
  int source = lane;
  switch (f.operation) {
    case SHFL: source = start + (f.parameter & (f.width - 1)); break;
    case SHFL_UP: source -= f.parameter; break;
    case SHFL_DOWN: source += f.parameter; break;
    case SHFL_XOR: source ^= f.parameter; break;
    case BALLOT: case ANY: case ALL: {
      unsigned ballot = 0;
      for (int i = 0; i < 32; i++) if (live >> i & 1 && lanes[i].value) ballot |= 1u << i;
      got = f.operation == BALLOT ? ballot : f.operation == ANY ? ballot != 0 : ballot == live;
      return true;
    }
    default: got = 0; return true;
  }
  if (source < start || source >= end) source = lane;
  got = live >> source & 1 ? lanes[source].value : 0;
  return live >> source & 1;
}

// Opens the operation that the lanes of `mask` wait in, once all of them that still run are there.
void try_warp(unsigned number, unsigned mask) {
  Warp& warp = warps[number];
  const unsigned live = mask & warp.alive;
  if (!live || live & ~warp.waiting) return;
  Fiber* lanes = &fibers[number * 32];
  const Fiber& any = lanes[__builtin_ctz(live)];
  void* pointers[32] = {};
  for (unsigned lane = 0; lane < 32; lane++) {
    if (!(live >> lane & 1)) continue;
    const Fiber& f = lanes[lane];
    if ((f.mask & warp.alive) != live) return;
    if (f.operation != any.operation)
      fail("lanes of one warp meet in different operations: %s %s in %s, %s %s in %s", name(any.thread).c_str(), place(any).c_str(),
           NAMES[any.operation], name(f.thread).c_str(), place(f).c_str(), NAMES[f.operation]);
    pointers[lane] = reinterpret_cast<void*>(f.value);
  }
  if (failed) return;
  if (any.whole) any.whole(pointers);
  for (unsigned lane = 0; lane < 32; lane++)
    if (live >> lane & 1) { lanes[lane].defined = combine(lanes, live, lane); lanes[lane].state = RUNNING; }
  warp.waiting &= ~live;
  if (audit && (any.operation == SYNCWARP || any.operation == WMMA)) audit->syncwarp(number, live, live == warp.alive);
}

void leave(const Fiber& fiber) {                         // a lane has returned: those that waited for it may go on
  Warp& warp = warps[fiber.thread.warp];
  warp.alive &= ~(1u << fiber.thread.lane);
  for (unsigned lane = 0; lane < 32 && !failed; lane++)
    if (warp.waiting >> lane & 1) try_warp(fiber.thread.warp, fibers[fiber.thread.warp * 32 + lane].mask);
}

// --- one block ----------------------------------------------------------------------------------------------------------------------------

// No thread runs. True if the block is done; otherwise opens the barrier, or says why nothing can go on.
bool settle() {
  const Fiber *waits = nullptr, *meets = nullptr, *returned = nullptr;
  size_t at_barrier = 0, gone = 0;
  int count = 0;
  for (const Fiber& f : fibers) {
    if (f.state == AT_BARRIER) { at_barrier++; count += f.predicate; if (!waits) waits = &f; }
    else if (f.state == RETURNED) { gone++; if (!returned) returned = &f; }
    else if (!meets) meets = &f;
  }
  if (gone == fibers.size()) return true;
  if (meets) {
    const Warp& warp = warps[meets->thread.warp];
    const unsigned absent = meets->mask & warp.alive & ~warp.waiting;
    fail("deadlock: %s waits at %s in %s with mask 0x%08x; %s", name(meets->thread).c_str(), place(*meets).c_str(), NAMES[meets->operation], meets->mask,
         absent ? ("lane " + std::to_string(__builtin_ctz(absent)) + " waits at " + place(fibers[meets->thread.warp * 32 + __builtin_ctz(absent)]) +
                   " in __syncthreads instead").c_str() : "other lanes of the mask came with another mask");
  } else if (gone) {
    fail("barrier divergence: %zu threads wait at %s in __syncthreads, but %zu have returned, the first of them %s",
         at_barrier, place(*waits).c_str(), gone, name(returned->thread).c_str());
  } else {
    for (const Fiber& f : fibers)
      if (f.at.line != waits->at.line || f.kind != waits->kind || std::strcmp(f.at.file, waits->at.file)) {
        fail("barrier divergence: %s waits at %s, %s at %s", name(waits->thread).c_str(), place(*waits).c_str(), name(f.thread).c_str(), place(f).c_str());
        return true;
      }
    const int all = count == int(fibers.size()), results[] = {0, count, all, count > 0};
    for (Fiber& f : fibers) { f.result = results[f.kind]; f.state = RUNNING; }
    if (audit) audit->barrier();
  }
  return failed;
}

enum Order { FORWARD, REVERSE, SHUFFLED };

void run_block(uint3 block, dim3 grid, dim3 dim, Order order, std::mt19937& random) {
  const unsigned threads = dim.x * dim.y * dim.z;
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, {0, 0});
  arrays.clear();
  free_memory = memory + DYNAMIC;
  static_bytes = 0;
  std::memset(memory, 0xff, dynamic_bytes);              // NaN in every float type
  if (audit) {
    audit->block(block, dim, fibers.data(), threads * sizeof(Fiber), stacks, threads * STACK);
    if (dynamic_bytes) audit->shared(memory, dynamic_bytes, 1, "dynamic shared memory");
  }
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].thread = {{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)}, block, dim, grid, i, i % 32, i / 32};
    fibers[i].state = RUNNING;
    prepare(fibers[i], stacks + i * STACK);
    warps[i / 32].alive |= 1u << i % 32;
    turn[i] = order == REVERSE ? threads - 1 - i : i;
  }
  do {
    bool ran = true;
    while (ran && !failed) {
      ran = false;
      if (order == SHUFFLED) std::shuffle(turn.begin(), turn.end(), random);
      for (unsigned i : turn) {
        if (fibers[i].state != RUNNING) continue;
        resume(fibers[i]);
        ran = true;
        if (failed) break;
        if (fibers[i].state == RETURNED) leave(fibers[i]);
      }
    }
  } while (!failed && !settle());
  if (audit) audit->block_done();
}
}  // namespace

std::string name(const Thread& t) {
  char text[128];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", t.index.x, t.index.y, t.index.z, t.block.x, t.block.y, t.block.z);
  return text;
}

void stop() {
  failed = true;
  if (current) wait();                                   // never to return
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (error.empty()) error = text;
  stop();
}

int barrier(int kind, int predicate, const char* file, int line) {
  Fiber& f = *running;
  f.state = AT_BARRIER, f.at = {file, line}, f.kind = kind, f.predicate = predicate;
  wait();
  return f.result;
}

uint64_t meet(Operation operation, unsigned mask, uint64_t value, int parameter, int width, const char* file, int line, Whole whole) {
  Fiber& f = *running;
  f.state = IN_WARP, f.at = {file, line}, f.operation = operation, f.mask = mask, f.value = value;
  f.parameter = parameter, f.width = width, f.whole = whole;
  if (!(mask >> f.thread.lane & 1)) fail("%s:%d: %s calls %s with mask 0x%08x, which lacks its own lane %u", file, line, name(f.thread).c_str(), NAMES[operation], mask, f.thread.lane);
  if (width < 1 || width > 32 || width & (width - 1)) fail("%s:%d: %s: expected width 1, 2, 4, 8, 16 or 32, got %d", file, line, NAMES[operation], width);
  warps[f.thread.warp].waiting |= 1u << f.thread.lane;
  try_warp(f.thread.warp, mask);
  if (f.state != RUNNING) wait();
  if (!f.defined) fail("%s:%d: %s reads in %s from a lane that is not in the mask or has returned: an undefined value", file, line, name(f.thread).c_str(), NAMES[operation]);
  return f.got;
}

void* shared(const Shared& array) {
  for (auto& [known, address] : arrays) if (known == &array) return address;
  static_bytes += array.bytes;
  unsigned char* address = free_memory;
  free_memory += (array.bytes + 4095) / 4096 * 4096 + 4096;            // a gap, so that the audit sees what goes past the end
  if (dynamic_bytes + static_bytes > DYNAMIC || free_memory > memory + MEMORY)
    fail("%s: the block asks for %zu bytes of static and %zu of dynamic shared memory, more than any device has (%zu)", array.name, static_bytes, dynamic_bytes, DYNAMIC);
  std::memset(address, 0xff, array.bytes);
  arrays.push_back({&array, address});
  if (audit) audit->shared(address, array.bytes, array.element, array.name);
  return address;
}

void touch(const void* address, int bytes, bool write, bool atomic, void* pc) { if (audit) audit->touch(address, bytes, write, atomic, pc); }
}  // namespace simt

extern simt::Entry simt_entries[];
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* simt_signature(int entry) { return simt_entries[entry].codes; }
EXPORTED const char* simt_error() { return simt::error.c_str(); }
EXPORTED void simt_launch(int entry, const unsigned* grid, const unsigned* block, size_t shared, void** arguments, int order, unsigned seed) {
  using namespace simt;
  static unsigned room;
  const dim3 g{grid[0], grid[1], grid[2]}, b{block[0], block[1], block[2]};
  const unsigned threads = b.x * b.y * b.z;
  kernel = &simt_entries[entry], kernel_arguments = arguments, dynamic_bytes = shared, failed = false;
  error.clear();
  if (threads > room) {
    if (room) munmap(stacks, room * STACK);
    stacks = static_cast<char*>(mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    room = threads;
    if (stacks == MAP_FAILED) { room = 0; error = "no memory for the threads' stacks"; return; }
  }
  std::mt19937 random(seed);
  const size_t blocks = size_t(g.x) * g.y * g.z;
  std::vector<size_t> turn(order == SHUFFLED ? blocks : 0);
  for (size_t i = 0; i < turn.size(); i++) turn[i] = i;
  std::shuffle(turn.begin(), turn.end(), random);
  for (size_t i = 0; i < blocks && !failed; i++) {
    const size_t j = order == SHUFFLED ? turn[i] : order == REVERSE ? blocks - 1 - i : i;
    run_block({unsigned(j % g.x), unsigned(j / g.x % g.y), unsigned(j / g.x / g.y)}, g, b, Order(order), random);
  }
}
