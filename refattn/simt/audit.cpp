// Sees every load and store of the kernels. They are compiled with -fsanitize=thread,alignment, which calls a function before each access;
// libtsan and libubsan are not linked, the functions are the ones at the end of this file. As threads run one at a time and in a fixed order,
// what is found does not depend on luck: two accesses race if no barrier orders them, however the threads happened to run.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <tuple>
#include <vector>
#include <link.h>
#include "runtime.h"

namespace simt {
namespace {
// The last write and the reads since of one granule. Time counts barriers, through all blocks; a lane's epoch counts its __syncwarps.
struct Access { uint32_t time; uint16_t thread, site; };
struct Cell {
  Access write, first_read, reads[2];      // first_read: the first of all, to find blocks that race; reads: two different threads since then
  uint32_t write_epoch, read_epoch, read_lanes;
  uint8_t read_warp;
  bool atomic, several_warps;
};
struct Region {
  uintptr_t low, high;
  bool is_shared;
  unsigned granule_shift, element;
  std::string name;
  Cell* cells;
};
struct Site {                              // an instruction that loads or stores
  uintptr_t pc; int bytes; bool write, is_shared;
  uint64_t requests, lanes, sectors, ideal_sectors, passes, ideal_passes;
};
struct Request { uint32_t lanes, address[32]; };
struct Queue { std::vector<Request> requests; uint32_t next[32] = {}; };      // requests of one site; next: how many each lane has made
struct Clock { uint32_t known[32][32], own[32]; };                            // known[i][j]: the last epoch of lane j that lane i comes after
struct Finding { std::string text; uint64_t more, access; };

std::vector<Region> global_regions, shared_regions;
Region* last_region[2];
std::vector<Site> sites;
std::vector<std::pair<uint64_t, int>> site_table;
std::vector<std::vector<Queue>> queues;    // [warp][site]
std::vector<Clock> clocks;
std::vector<std::pair<uint32_t, uint3>> blocks;   // start and index of each block so far
dim3 dim;
uint32_t now, block_start;
bool traffic_only, enabled;
uintptr_t ignored[2][2], image_low, image_high, origin;
std::map<std::tuple<std::string, int, int, uintptr_t>, size_t> seen;
std::vector<Finding> findings;
uint64_t accesses;

// --- findings -----------------------------------------------------------------------------------------------------------------------------

std::string at(int site) { char text[32]; std::snprintf(text, sizeof text, "@0x%zx", size_t(sites[site].pc)); return text; }

std::string thread_at(const Access& access) {
  auto block = std::upper_bound(blocks.begin(), blocks.end(), access.time, [](uint32_t time, auto& b) { return time < b.first; }) - 1;
  const unsigned t = access.thread;
  return name({{t % dim.x, t / dim.x % dim.y, t / (dim.x * dim.y)}, block->second, {}, {}, 0, 0, 0});
}

// kind, place, thread, read or write, bytes, array, offset in it, its bytes, bytes of an element, and for a race the other place, thread, read or write
void report(const char* kind, int site, const Region& region, uintptr_t address, const Access* other = nullptr, bool other_writes = false) {
  auto [known, is_new] = seen.insert({{kind, site, other ? other->site : -1, region.low}, findings.size()});
  if (!is_new) {
    Finding& finding = findings[known->second];
    finding.more += finding.access != accesses;            // once for an access, however many granules it has
    finding.access = accesses;
    return;
  }
  const Site& s = sites[site];
  std::string text = std::string(kind) + "\t" + at(site) + "\t" + name(*current) + "\t" + (s.write ? "writes" : "reads") + "\t" + std::to_string(s.bytes) + "\t" +
    region.name + "\t" + std::to_string(intptr_t(address - region.low)) + "\t" + std::to_string(region.high - region.low) + "\t" + std::to_string(region.element);
  if (other) text += "\t" + at(other->site) + "\t" + thread_at(*other) + "\t" + (other_writes ? "wrote" : "read");
  findings.push_back({text, 0, accesses});
}

// --- traffic ------------------------------------------------------------------------------------------------------------------------------

int site_of(uintptr_t pc, int bytes, bool write, bool is_shared) {
  const uint64_t key = uint64_t(pc - image_low) << 8 | bytes << 2 | write << 1 | is_shared;
  size_t i = (key * 0x9e3779b97f4a7c15ull) >> 48;
  while (site_table[i].first != key) {
    if (!site_table[i].first) {
      site_table[i] = {key, int(sites.size())};
      sites.push_back({pc - image_low - 1, bytes, write, is_shared, 0, 0, 0, 0, 0, 0});      // one back: inside of the call
      break;
    }
    i = (i + 1) & 0xffff;
  }
  return site_table[i].second;
}

void count_global(Site& site, const Request& request) {
  uint32_t addresses[32], sectors[64];
  int n = 0, m = 0;
  for (int lane = 0; lane < 32; lane++) if (request.lanes >> lane & 1) addresses[n++] = request.address[lane];
  if (!std::is_sorted(addresses, addresses + n)) std::sort(addresses, addresses + n);
  n = std::unique(addresses, addresses + n) - addresses;
  for (int i = 0; i < n; i++)
    for (uint32_t s = addresses[i] / 32; s <= (addresses[i] + site.bytes - 1) / 32; s++) if (!m || sectors[m - 1] < s) sectors[m++] = s;
  site.sectors += m;
  site.ideal_sectors += (n * site.bytes + 31) / 32;
}

// 32 banks of 4 bytes. Accesses of 8 and 16 bytes go half and quarter warp by quarter warp; in each, a bank serves one word at a time.
void count_shared(Site& site, const Request& request) {
  const int together = site.bytes <= 4 ? 32 : site.bytes == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += together) {
    if (!(request.lanes >> first & (together == 32 ? ~0u : (1u << together) - 1))) continue;
    uint32_t words[32][32];
    int count[32] = {}, most = 0;
    for (int lane = first; lane < first + together; lane++) {
      if (!(request.lanes >> lane & 1)) continue;
      for (uint32_t word = request.address[lane] / 4; word <= (request.address[lane] + site.bytes - 1) / 4; word++) {
        const int bank = word % 32;
        if (std::find(words[bank], words[bank] + count[bank], word) != words[bank] + count[bank]) continue;
        words[bank][count[bank]++] = word;
        most = std::max(most, count[bank]);
      }
    }
    site.passes += most;
    site.ideal_passes++;
  }
}

void count(unsigned warp) {
  for (size_t i = 0; i < queues[warp].size(); i++) {
    Queue& queue = queues[warp][i];
    Site& site = sites[i];
    for (const Request& request : queue.requests) {
      site.requests++;
      site.lanes += __builtin_popcount(request.lanes);
      if (site.is_shared) count_shared(site, request); else count_global(site, request);
    }
    queue.requests.clear();
    std::fill(queue.next, queue.next + 32, 0);
  }
}

// The n-th access of a lane at a site belongs to the warp's n-th request there since the last barrier.
void enqueue(int site, uint32_t address) {
  auto& of_warp = queues[current->warp];
  if (of_warp.size() <= size_t(site)) of_warp.resize(site + 16);
  Queue& queue = of_warp[site];
  const uint32_t n = queue.next[current->lane]++;
  if (queue.requests.size() <= n) queue.requests.push_back({});
  queue.requests[n].lanes |= 1u << current->lane;
  queue.requests[n].address[current->lane] = address;
}

// --- races --------------------------------------------------------------------------------------------------------------------------------

bool after(const Clock& clock, unsigned lane, uint32_t other_lanes, uint32_t epoch) {
  for (; other_lanes; other_lanes &= other_lanes - 1) if (clock.known[lane][__builtin_ctz(other_lanes)] < epoch) return false;
  return true;
}

void look(Cell& cell, const Region& region, int site, bool write, bool atomic, uintptr_t address) {
  const uint16_t thread = current->linear;
  const unsigned lane = current->lane, warp = current->warp;
  const Clock& clock = clocks[warp];
  if (region.is_shared && !write && cell.write.time < block_start) report("uninitialised", site, region, address);
  bool unordered = false;                                  // this access and the last write
  if (cell.write.time == now)
    unordered = cell.write.thread != thread && (cell.write.thread / 32u != warp || clock.known[lane][cell.write.thread % 32] < cell.write_epoch);
  else if (cell.write.time < block_start)
    unordered = cell.write.time && !region.is_shared;
  if (unordered && !(atomic && cell.atomic)) report("race", site, region, address, &cell.write, true);
  Access mine{now, thread, uint16_t(site)};
  if (!write) {
    if (!cell.first_read.time) cell.first_read = mine;
    const bool superseded = cell.read_warp == warp && !cell.several_warps && cell.read_epoch < clock.own[lane] &&
                            after(clock, lane, cell.read_lanes & ~(1u << lane), cell.read_epoch);
    if (cell.reads[0].time != now || superseded) {
      cell.reads[0] = mine, cell.reads[1].time = 0;
      cell.read_warp = warp, cell.read_lanes = 0, cell.read_epoch = 0, cell.several_warps = false;
    } else if (cell.reads[0].thread != thread) {
      cell.reads[1] = mine;
    }
    cell.several_warps |= cell.read_warp != warp;
    cell.read_lanes |= 1u << lane;
    cell.read_epoch = std::max(cell.read_epoch, clock.own[lane]);
    return;
  }
  if (cell.reads[0].time == now) {
    const Access& other = cell.reads[0].thread != thread ? cell.reads[0] : cell.reads[1];
    if (other.time == now && (cell.several_warps || cell.read_warp != warp || !after(clock, lane, cell.read_lanes & ~(1u << lane), cell.read_epoch)))
      report("race", site, region, address, &other, false);
  }
  if (!region.is_shared && cell.first_read.time && cell.first_read.time < block_start) report("race", site, region, address, &cell.first_read, false);
  cell.write = mine, cell.write_epoch = clock.own[lane], cell.atomic = atomic;
}

// --- every access -------------------------------------------------------------------------------------------------------------------------

Region* find(uintptr_t address) {
  for (Region* region : last_region) if (region && address - region->low < region->high - region->low) return region;
  for (auto* regions : {&shared_regions, &global_regions})
    for (Region& region : *regions)
      if (address - region.low < region.high - region.low) return last_region[region.is_shared] = &region;
  return nullptr;
}

bool in_memory(uintptr_t address) { return address - uintptr_t(memory) < MEMORY; }

const Region& nearest(uintptr_t address) {
  static const Region none{0, 0, false, 0, 0, "no array", nullptr};
  const Region* best = &none;
  uintptr_t least = 1 << 24;
  for (const Region& region : in_memory(address) ? shared_regions : global_regions) {
    const uintptr_t distance = address < region.low ? region.low - address : address - region.high;
    if (distance < least) least = distance, best = &region;
  }
  return *best;
}

void access(const void* pointer, int bytes, bool write, bool atomic, void* pc) {
  const uintptr_t address = uintptr_t(pointer);
  if (address - ignored[0][0] < ignored[0][1] || address - ignored[1][0] < ignored[1][1] || pointer == &current || !enabled) return;
  accesses++;
  Region* region = find(address);
  if (!region || address + bytes > region->high) {
    if (!region && address - image_low < image_high - image_low && !in_memory(address)) return;      // a constant of the source
    if (!region) region = const_cast<Region*>(&nearest(address));
    report("out of bounds", site_of(uintptr_t(pc), bytes, write, region->is_shared), *region, address);
    stop();
  }
  const int site = site_of(uintptr_t(pc), bytes, write, region->is_shared);
  enqueue(site, uint32_t(address - (region->is_shared ? uintptr_t(memory) : origin)));
  if (traffic_only) return;
  const uintptr_t end = (address + bytes - 1 - region->low) >> region->granule_shift;
  for (uintptr_t i = (address - region->low) >> region->granule_shift; i <= end; i++) look(region->cells[i], *region, site, write, atomic, address);
}

void misaligned(const void* pointer, int alignment, void* pc) {
  const uintptr_t address = uintptr_t(pointer);
  Region* region = find(address);
  if (!enabled || !region) return;
  report("misaligned", site_of(uintptr_t(pc), alignment, false, region->is_shared), *region, address);
  stop();
}

void add(std::vector<Region>& regions, uintptr_t low, size_t bytes, bool is_shared, unsigned element, const char* name) {
  const unsigned shift = element == 1 && name[0] != 'd';      // dynamic shared memory is declared as bytes, and used as something wider
  const size_t cells = (bytes >> (1 - shift)) + 1;
  regions.push_back({low, low + bytes, is_shared, 1 - shift, element, name, traffic_only ? nullptr : static_cast<Cell*>(std::calloc(cells, sizeof(Cell)))});
  last_region[0] = last_region[1] = nullptr;
}

void clear(std::vector<Region>& regions) {
  for (Region& region : regions) std::free(region.cells);
  regions.clear();
  last_region[0] = last_region[1] = nullptr;
}

struct : Audit {
  void block(uint3 index, dim3 d, const void* threads, size_t threads_bytes, const void* stacks, size_t stacks_bytes) override {
    const unsigned warps = (d.x * d.y * d.z + 31) / 32;
    dim = d;
    block_start = ++now;
    blocks.push_back({now, index});
    ignored[0][0] = uintptr_t(threads), ignored[0][1] = threads_bytes, ignored[1][0] = uintptr_t(stacks), ignored[1][1] = stacks_bytes;
    queues.resize(warps);
    clocks.resize(warps);
    restart();
    enabled = true;
  }
  void shared(unsigned char* address, size_t bytes, unsigned element, const char* name) override {
    for (Region& region : shared_regions) if (region.low == uintptr_t(address) && region.high == region.low + bytes) return;
    add(shared_regions, uintptr_t(address), bytes, true, element, name);
  }
  void barrier() override {
    for (unsigned warp = 0; warp < queues.size(); warp++) count(warp);
    now++;
    restart();
  }
  void syncwarp(unsigned warp, unsigned lanes, bool whole) override {
    Clock& clock = clocks[warp];
    uint32_t known[32] = {};
    for (int i = 0; i < 32; i++)
      for (int j = 0; j < 32; j++)
        if (lanes >> i & 1) known[j] = std::max(known[j], i == j ? clock.own[j] : clock.known[i][j]);
    for (int i = 0; i < 32; i++)
      if (lanes >> i & 1) { std::copy(known, known + 32, clock.known[i]); clock.own[i]++; }
    if (whole) count(warp);
  }
  void block_done() override {
    for (unsigned warp = 0; warp < queues.size(); warp++) count(warp);
    enabled = false;
  }
  void touch(const void* address, int bytes, bool write, bool atomic, void* pc) override { access(address, bytes, write, atomic, pc); }

  void restart() {
    for (Clock& clock : clocks) { std::memset(clock.known, 0, sizeof clock.known); std::fill(clock.own, clock.own + 32, 1); }
  }
} hooks;

int find_image(dl_phdr_info* info, size_t, void* inside) {
  uintptr_t low = UINTPTR_MAX, high = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    low = std::min(low, uintptr_t(info->dlpi_addr + header.p_vaddr));
    high = std::max(high, uintptr_t(info->dlpi_addr + header.p_vaddr + header.p_memsz));
  }
  if (uintptr_t(inside) - low >= high - low) return 0;
  image_low = low, image_high = high;
  return 1;
}

__attribute__((constructor)) void start() {
  audit = &hooks;
  dl_iterate_phdr(find_image, &hooks);
}
}  // namespace
}  // namespace simt

// --- what Python calls --------------------------------------------------------------------------------------------------------------------

#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED void simt_audit_start(int traffic_only, uintptr_t origin) {
  using namespace simt;
  clear(global_regions), clear(shared_regions);
  sites.clear(), site_table.assign(1 << 16, {0, 0}), queues.clear(), blocks.clear(), seen.clear(), findings.clear();
  simt::traffic_only = traffic_only, simt::origin = origin, now = 0;
}
EXPORTED void simt_audit_array(uintptr_t address, size_t bytes, unsigned element, const char* name) {
  simt::add(simt::global_regions, address, bytes, false, element, name);
}
EXPORTED const char* simt_audit_findings() {
  static std::string text;
  text.clear();
  for (auto& finding : simt::findings) text += std::to_string(finding.more) + "\t" + finding.text + "\n";
  return text.c_str();
}
EXPORTED const char* simt_audit_traffic() {
  static std::string text;
  text.clear();
  for (auto& s : simt::sites) {
    text += std::to_string(s.pc) + (s.is_shared ? " shared" : " global") + (s.write ? " W " : " R ");
    for (uint64_t n : {uint64_t(s.bytes), s.requests, s.lanes, s.sectors, s.ideal_sectors, s.passes, s.ideal_passes}) text += std::to_string(n) + " ";
    text += "\n";
  }
  return text.c_str();
}

// --- what the compiler calls --------------------------------------------------------------------------------------------------------------

extern "C" {
#define PC __builtin_return_address(0)
#define SIMT_WIDTH(N) \
  void __tsan_read##N(void* a) { simt::access(a, N, false, false, PC); } \
  void __tsan_write##N(void* a) { simt::access(a, N, true, false, PC); } \
  void __tsan_unaligned_read##N(void* a) { simt::access(a, N, false, false, PC); } \
  void __tsan_unaligned_write##N(void* a) { simt::access(a, N, true, false, PC); }
SIMT_WIDTH(1) SIMT_WIDTH(2) SIMT_WIDTH(4) SIMT_WIDTH(8) SIMT_WIDTH(16)
void __tsan_read_range(char* a, size_t n) { for (size_t i = 0; i < n; i += 4) simt::access(a + i, std::min<size_t>(4, n - i), false, false, PC); }
void __tsan_write_range(char* a, size_t n) { for (size_t i = 0; i < n; i += 4) simt::access(a + i, std::min<size_t>(4, n - i), true, false, PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
struct Mismatch { const char* file; uint32_t line, column; const void* type; unsigned char log_alignment, kind; };
void __ubsan_handle_type_mismatch_v1(const Mismatch* what, void* a) { simt::misaligned(a, 1 << what->log_alignment, PC); }
}
