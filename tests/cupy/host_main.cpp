// Runs a kernel on a grid: fibers, meetings, blocks. Linked to each kernel, which is `run_kernel`.

#include "host.h"

extern "C" void run_kernel(const void* params);

__thread Index threadIdx, blockIdx;
__thread char* smem;
__thread Block* here;
static __thread const void* argument;
static __thread bool finished;

void yield() {
    u32 me = threadIdx.x;
    if (_setjmp(here->fibers[me].at) == 0) _longjmp(here->home, 1);
    threadIdx.x = me;
}

u32 come(Meeting* m, u32 seat, u64 a, u64 b, u64 c) {
    u32 number = m->number;
    u64* mine = m->left[number % 2][seat];
    mine[0] = a, mine[1] = b, mine[2] = c;
    ++here->steps;
    if (++m->come == m->size) {
        m->come = 0, ++m->number;
    } else {
        while (m->number == number) yield();
    }
    return number % 2;
}

static void fiber() {
    run_kernel(argument);
    finished = true;
    _longjmp(here->home, 1);
}

// Until it waits for others, or has finished.
static void run_fiber(Fiber& fiber, bool started) {
    if (_setjmp(here->home) != 0) return;
    if (started) _longjmp(fiber.at, 1);
    setcontext(&fiber.context);
}

static void make_fiber(Fiber& made) {
    constexpr size_t STACK = 192 * 1024;
    // Pages that nothing is written to cost nothing.
    made.stack.reset(new char[STACK]);
    getcontext(&made.context);
    made.context.uc_stack.ss_sp = made.stack.get();
    made.context.uc_stack.ss_size = STACK;
    made.context.uc_link = nullptr;
    makecontext(&made.context, fiber, 0);
}

static void run_block(Cluster* cluster, u32 block, u32 rank, u32 threads, const void* params) {
    Block self;
    self.cluster = cluster;
    self.fibers = std::vector<Fiber>(threads);
    self.copies.resize(threads);
    Meeting all;
    all.size = threads;
    self.all = &all;
    std::vector<Meeting> warps(threads / 32);
    for (auto& w : warps) self.warps.push_back(&w);
    here = &self;
    argument = params;
    blockIdx.x = block;
    smem = cluster->memories[rank].data();
    std::vector<bool> started(threads), done(threads);
    u32 left = threads;
    u64 idle = 0, steps = ~0ull;
    while (left) {
        if (self.steps == steps && ++idle > 3) {
            fprintf(stderr, "block %u: %u threads wait for others that never come\n", block, left);
            abort();
        }
        if (self.steps != steps) idle = 0;
        steps = self.steps;
        for (u32 t = 0; t < threads; ++t) {
            if (done[t]) continue;
            threadIdx.x = t;
            if (!started[t]) make_fiber(self.fibers[t]);
            finished = false;
            run_fiber(self.fibers[t], started[t]);
            started[t] = true;
            if (finished) done[t] = true, --left, ++self.steps;
        }
    }
}

// Bytes that are watched behind a block's shared memory.
constexpr u32 BEYOND = 1 << 16;

// `side` blocks run side by side.
extern "C" void emulate(const void* params, u32 grid, u32 threads, u32 shared, u32 side) {
    for (u32 first = 0; first < grid; first += side) {
        Cluster cluster;
        cluster.size = side;
        for (u32 i = 0; i < side; ++i)
            // Undefined contents, like those of shared memory; what lies beyond must not change.
            cluster.memories.emplace_back(shared + BEYOND, char(0x7b));
        std::vector<std::thread> blocks;
        for (u32 i = 0; i < side; ++i)
            blocks.emplace_back(run_block, &cluster, first + i, i, threads, params);
        for (auto& block : blocks) block.join();
        for (auto& memory : cluster.memories)
            for (u32 i = shared; i < shared + BEYOND; ++i)
                if (memory[i] != char(0x7b)) {
                    fprintf(stderr, "written beyond %u bytes of shared memory, at %u\n", shared, i);
                    abort();
                }
    }
}
