// The scheduler of the host runtime: fibres, barriers, warps, shared memory with its shadow.
#include <sys/mman.h>

#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {
namespace {
constexpr size_t kStackBytes = (64 << 10) + 320;  // off powers of two, which share a cache's places
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticBytes = 48 << 10, kSharedBytes = 99 << 10;  // of every card since sm_86
constexpr int kManyThreads = -1;

// Contexts: callee-saved registers on a stack of their own.
#if defined(__x86_64__)
using Context = void*;
extern "C" void cuda_host_switch(Context* save, Context to);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
void switch_to(Context& save, Context& to) { cuda_host_switch(&save, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // as if entry had been called
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_to(Context& save, Context& to) { swapcontext(&save, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { kReady, kAtBarrier, kInWarp, kDone };
struct Thread {
  Context context;
  State state;
  dim3 inside;
  int id;
  const char* site;  // where it waits
};
// Lanes that wait for each other.
struct Meeting {
  unsigned mask, arrived;
  const char* site;
};
struct Warp {
  uint64_t given[32];
  Gathered gathered;
  int epoch;
  std::vector<Meeting> meetings;
};
// Of one byte of shared memory: who touched it last, and when.
struct Touch {
  int thread, epoch, warp_epoch, warp;  // epoch 0: never
};
struct Shadow {
  Touch write, read;
  bool atomic;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> ready;
  std::map<const void*, SharedArray> arrays;
  size_t used = 0, dynamic = 0;
  int epoch = 0;
};

std::mutex one_launch;
std::minstd_rand random_order;
std::map<const char*, const char*> extents;  // begin: end
Block block;
std::vector<char> memory;
std::vector<Shadow> shadow;
std::string failure, last_error;
const std::function<void()>* body;
Thread* self;
Context scheduler;
char* stacks = nullptr;

std::string describe(const Thread& t) {
  return "thread " + std::to_string(t.id) + " of block " + std::to_string(blockIdx.x) +
         (gridDim.y > 1 ? "," + std::to_string(blockIdx.y) : "");
}

void enter() {
  try {
    (*body)();
  } catch (const Fault& f) {
    if (failure.empty()) failure = std::string(f.what()) + " (" + describe(*self) + ")";
  }
  self->state = State::kDone;
  switch_to(self->context, scheduler);
  __builtin_unreachable();
}

void wait(State state, const char* site) {
  self->state = state;
  self->site = site;
  switch_to(self->context, scheduler);
}

Warp& warp_of(const Thread& t) { return block.warps[t.id / 32]; }

// Past the last synchronisation that orders a touch before what this thread does now?
bool ordered(const Touch& touch) {
  if (touch.epoch < block.epoch || touch.thread == self->id) return true;
  return touch.warp == self->id / 32 && touch.warp_epoch < warp_of(*self).epoch;
}

Touch touch_now() { return {self->id, block.epoch, warp_of(*self).epoch, self->id / 32}; }

void note_read(Touch& read) {
  Touch now = touch_now();
  if (read.epoch == now.epoch && read.thread != now.thread && !ordered(read)) {
    now.thread = kManyThreads;
    if (read.warp != now.warp) now.warp = kManyThreads;
  }
  read = now;
}

void race(const char* what, const SharedArray& array, size_t at, const Touch& other) {
  std::string who = other.thread < 0 ? "other threads" : "thread " + std::to_string(other.thread);
  fault("race on shared memory: " + std::string(what) + " byte " +
        std::to_string(at - array.begin) + " of " + array.name + ", which " + who +
        " touched since the last barrier");
}

void start_block(dim3 grid, dim3 at, dim3 threads, size_t dynamic_bytes) {
  gridDim = grid;
  blockIdx = at;
  blockDim = threads;
  unsigned count = threads.x * threads.y * threads.z;
  std::fill_n(shadow.begin(), block.used, Shadow{});  // of the block before
  memory.assign(kSharedBytes, static_cast<char>(0xff));
  block.arrays.clear();
  block.used = block.dynamic = dynamic_bytes;
  block.epoch = 1;
  block.warps.assign(ceil(count / 32.0), Warp{});
  for (Warp& w : block.warps) w.epoch = 1;
  block.threads.resize(count);
  block.ready.clear();
  for (unsigned i = 0; i < count; i++) {
    Thread& t = block.threads[i];
    t.inside = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
    t.state = State::kReady;
    t.id = static_cast<int>(i);
    block.ready.push_back(t.id);
    prepare(t.context, stacks + i * kStackBytes, enter);
  }
}

// Waits until every lane of the mask has come to this place.
void meet(unsigned mask, const char* site, bool orders) {
  Warp& warp = warp_of(*self);
  size_t first = self->id / 32 * 32;
  if (!(mask >> lane() & 1)) fault("a lane outside the mask takes part at " + std::string(site));
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const Meeting& m) { return m.site == site && m.mask == mask; });
  if (meeting == warp.meetings.end())
    meeting = warp.meetings.insert(meeting, Meeting{mask, 0, site});
  meeting->arrived |= 1u << lane();
  if (meeting->arrived == mask) {
    warp.meetings.erase(meeting);
    if (orders) warp.epoch++;
    for (size_t i = 0; i < 32; i++) {
      if (!(mask >> i & 1)) continue;
      warp.gathered.value[i] = warp.given[i];
      block.threads[first + i].state = State::kReady;
      if (i != static_cast<size_t>(lane())) block.ready.push_back(static_cast<int>(first + i));
    }
    block.ready.push_back(self->id);
    switch_to(self->context, scheduler);
  } else {
    wait(State::kInWarp, site);
  }
}

std::string whereabouts() {
  std::map<std::string, int> places;
  for (const Thread& t : block.threads)
    places[t.state == State::kDone ? "have returned" : std::string("wait at ") + t.site]++;
  std::string text;
  for (const auto& [place, count] : places)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
  return text;
}

void release_barrier() {
  for (const Thread& t : block.threads) {
    if (t.state == State::kInWarp)
      fault("deadlock: lanes wait for others of their warp: " + whereabouts());
    if (t.state != State::kAtBarrier || t.site != block.threads[0].site)
      fault("divergent barrier: " + whereabouts());
  }
  block.epoch++;
  for (Thread& t : block.threads) {
    t.state = State::kReady;
    block.ready.push_back(t.id);
  }
}

void run_block() {
  while (true) {
    while (!block.ready.empty()) {
      int& chosen = block.ready[random_order() % block.ready.size()];
      self = &block.threads[chosen];
      chosen = block.ready.back();
      block.ready.pop_back();
      threadIdx = self->inside;
      switch_to(scheduler, self->context);
      if (!failure.empty()) throw Fault{failure};
    }
    bool done = std::all_of(block.threads.begin(), block.threads.end(),
                            [](const Thread& t) { return t.state == State::kDone; });
    if (done) return;
    release_barrier();
  }
}
}  // namespace

void fault(const std::string& text) { throw Fault{text}; }
int lane() { return self->id % 32; }

Extent extent_of(const void* address) {
  auto* at = static_cast<const char*>(address);
  auto next = extents.upper_bound(at);
  if (next == extents.begin() || at > std::prev(next)->second)
    fault("a kernel was given an address of no tensor");
  --next;
  return {next->first, next->second};
}

void out_of_bounds(const char* what, const char* at, size_t bytes, Extent extent) {
  if (extent.begin == nullptr) fault(std::string(what) + " through a null pointer");
  fault("out of bounds: " + std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
        std::to_string(at - extent.begin) + " of a tensor of " +
        std::to_string(extent.end - extent.begin) + " bytes");
}

SharedArray shared_array(const void* identity, const char* name, size_t bytes) {
  auto known = block.arrays.find(identity);
  if (known != block.arrays.end()) return known->second;
  size_t begin = (block.used + 15) / 16 * 16;
  if (begin + bytes - block.dynamic > kStaticBytes || begin + bytes > kSharedBytes)
    fault("shared memory of " + std::to_string(begin + bytes) + " bytes");
  block.used = begin + bytes;
  return block.arrays[identity] = {name, begin, begin + bytes};
}

SharedArray dynamic_shared(const char* name) { return {name, 0, block.dynamic}; }

char* shared_access(const SharedArray& array, int64_t at, size_t bytes, Access how) {
  auto first = static_cast<size_t>(at);
  if (at < static_cast<int64_t>(array.begin) || first + bytes > array.end)
    fault("out of bounds: " + std::to_string(bytes) + " bytes at " +
          std::to_string(at - static_cast<int64_t>(array.begin)) + " of " + array.name + " of " +
          std::to_string(array.end - array.begin) + " bytes");
  if (first % min<size_t>(bytes, 16) != 0)
    fault("misaligned access of " + std::to_string(bytes) + " bytes to " + array.name);
  for (size_t i = first; i < first + bytes; i++) {
    Shadow& s = shadow[i];
    bool both_atomic = how == Access::kAtomic && s.atomic;
    if (how != Access::kWrite && s.write.epoch == 0)
      fault("uninitialised read of byte " + std::to_string(i - array.begin) + " of " + array.name);
    if (s.write.epoch != 0 && !both_atomic && !ordered(s.write))
      race(how == Access::kRead ? "reads" : "writes", array, i, s.write);
    if (how != Access::kRead && s.read.epoch != 0 && !ordered(s.read))
      race("writes", array, i, s.read);
    if (how == Access::kRead) {
      note_read(s.read);
    } else {
      s.write = touch_now();
      s.atomic = how == Access::kAtomic;
    }
  }
  return memory.data() + first;
}

void barrier(const char* site) { wait(State::kAtBarrier, site); }

const Gathered& gather(unsigned mask, uint64_t value, const char* site) {
  Warp& warp = warp_of(*self);
  warp.given[lane()] = value;
  meet(mask, site, false);
  warp.gathered.mask = mask;
  return warp.gathered;
}

void warp_barrier(unsigned mask, const char* site) {
  meet(mask == 0 ? 0xffffffffu : mask, site, true);
}

int launch(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& thread) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    shadow.resize(kSharedBytes);
  }
  failure.clear();
  body = &thread;
  try {
    size_t count = size_t{threads.x} * threads.y * threads.z;
    if (count == 0 || count > kMaxThreads || grid.y > 65535 || grid.z > 65535)
      fault("invalid launch of " + std::to_string(count) + " threads");
    if (dynamic_bytes > kSharedBytes) fault("too much dynamic shared memory");
    std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_order);
    for (unsigned i : order) {
      dim3 at(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
      start_block(grid, at, threads, dynamic_bytes);
      run_block();
    }
  } catch (const Fault& f) {
    last_error = f.what();
    return 1;
  }
  return cudaSuccess;
}
}  // namespace cuda_host

const char* cudaGetErrorString(cudaError_t) { return cuda_host::last_error.c_str(); }

// For the tests: the order of blocks and threads, and which memory kernels may touch.
extern "C" {
__attribute__((visibility("default"))) void cuda_host_seed(unsigned seed) {
  cuda_host::random_order.seed(seed + 1);
}
__attribute__((visibility("default"))) void cuda_host_register(const char* begin, size_t bytes) {
  const char*& end = cuda_host::extents[begin];
  end = std::max(end, begin + bytes);
}
__attribute__((visibility("default"))) void cuda_host_forget() { cuda_host::extents.clear(); }
}
