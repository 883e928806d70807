/* A driver of an H100 that is absent.
 *
 * It has what Triton calls of libcuda, refuses what the manual says a driver refuses, and writes
 * down what it is asked to launch. What it refuses it counts, and it says why, in `counters` and as
 * the string of the error. Nothing runs: memory is as it was. Pointers may be of the host's memory.
 * One thread at a time may call it, as Triton does under Python's lock.
 *
 * Reading order: limits -> what is written down -> device and modules -> tensor maps -> launches.
 */
#include "cuda.h"
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CAPABILITY_MAJOR = 9,
    CAPABILITY_MINOR = 0,
    DRIVER_VERSION = 12080,
    SHARED_MEMORY_MODE = 17,              /* an attribute that later drivers know */
    PROCESSORS = 132,
    WARP = 32,
    THREADS = 1024,                       /* of a block */
    REGISTERS = 65536,                    /* of a block, and of a multiprocessor */
    REGISTERS_AT_A_TIME = 256,            /* is what a warp gets a multiple of */
    WARPS_AT_A_TIME = 4,                  /* a block gets registers for a multiple of so many */
    SHARED_WITHOUT_LEAVE = 48 * 1024,     /* bytes of a block, unless its kernel may have more */
    SHARED = 227 * 1024,                  /* bytes of a block */
    SHARED_OF_PROCESSOR = 228 * 1024,
    GRID_X = 2147483647,
    GRID_YZ = 65535,
    BOX = 256,                            /* elements of a box along any dimension */
    DIMENSIONS = 5,
};

/* -- what is written down; Python reads these ------------------------------------------------ */

struct counters {
    uint64_t launches, tensor_maps, refused;
    char error[256]; /* the last one */
};

struct tensor_map {
    uint64_t address;
    uint64_t sides[DIMENSIONS];   /* innermost first, as everything here */
    uint64_t strides[DIMENSIONS]; /* in bytes; the first is that of the second dimension */
    uint32_t box[DIMENSIONS];
    uint32_t type, rank, swizzle;
};

struct launch {
    uint64_t tensor_maps; /* how many had been made before it */
    uint32_t grid[3], block[3];
    uint32_t shared, registers;
    char name[128];
};

static struct counters counters;
static struct launch *launches;
static struct tensor_map *tensor_maps;

const struct counters *stub_counters(void) { return &counters; }
const struct launch *stub_launch(uint64_t n) { return n < counters.launches ? launches + n : NULL; }
const struct tensor_map *stub_tensor_map(uint64_t n) {
    return n < counters.tensor_maps ? tensor_maps + n : NULL;
}
void stub_forget(void) { memset(&counters, 0, sizeof counters); }

/* Return the place of entry `n` of a log that has `n` of them. */
static void *next(void **log, uint64_t n, size_t size) {
    if ((n & (n + 1)) == 0 || *log == NULL) /* it is full at every power of two, less one */
        *log = realloc(*log, (2 * n + 2) * size);
    return memset((char *)*log + n * size, 0, size);
}

static CUresult refuse(CUresult result, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(counters.error, sizeof counters.error, format, values);
    va_end(values);
    counters.refused++;
    return result;
}

#define REFUSE_IF(condition, ...) \
    if (condition) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__)

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_SUCCESS ? "no error" : counters.error;
    return CUDA_SUCCESS;
}

/* -- device and context ---------------------------------------------------------------------- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = DRIVER_VERSION, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = (CUcontext)1, CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = CAPABILITY_MAJOR; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = CAPABILITY_MINOR; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = PROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = WARP; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        *value = SHARED_OF_PROCESSOR; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: /* kHz */
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1000000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d is unknown here", attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    REFUSE_IF(attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER, "pointer attribute %d", attribute);
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

/* -- modules and kernels --------------------------------------------------------------------- */

struct CUfunc_st {
    char name[128];
    unsigned registers;     /* of a thread */
    unsigned static_shared; /* bytes */
    unsigned leave;         /* bytes of dynamic shared memory that it may have */
};

enum { KERNELS = 8 }; /* of a module: Triton's have one */

struct CUmod_st {
    unsigned count;
    struct CUfunc_st functions[KERNELS];
};

static unsigned registers_of_warp(const struct CUfunc_st *function) {
    unsigned registers = function->registers * WARP;
    return (registers + REGISTERS_AT_A_TIME - 1) / REGISTERS_AT_A_TIME * REGISTERS_AT_A_TIME;
}

static unsigned max_threads(const struct CUfunc_st *function) {
    unsigned of_warp = registers_of_warp(function);
    unsigned warps = of_warp ? REGISTERS / of_warp / WARPS_AT_A_TIME * WARPS_AT_A_TIME : THREADS;
    return warps * WARP < THREADS ? warps * WARP : THREADS;
}

/* Of a cubin, which is an ELF file, the section ".nv.info" is a list of (format, attribute, bytes)
 * and so many bytes; one attribute has a kernel's symbol and how many registers a thread of it
 * takes. ".nv.shared.<kernel>" is as long as its static shared memory. */
enum { WITH_SIZE = 4, REGISTER_COUNT = 0x2f };

struct cubin {
    const char *data, *section_names, *symbol_names;
    const Elf64_Shdr *sections;
    const Elf64_Sym *symbols;
    unsigned count;
};

static const char *section_name(const struct cubin *cubin, unsigned section) {
    return cubin->section_names + cubin->sections[section].sh_name;
}

static int open_cubin(struct cubin *cubin, const char *data) {
    const Elf64_Ehdr *header = (const void *)data;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 0;
    cubin->data = data;
    cubin->sections = (const void *)(data + header->e_shoff);
    cubin->count = header->e_shnum;
    cubin->section_names = data + cubin->sections[header->e_shstrndx].sh_offset;
    cubin->symbols = NULL;
    for (unsigned i = 0; i < cubin->count; i++) {
        const Elf64_Shdr *section = &cubin->sections[i];
        if (section->sh_type != SHT_SYMTAB) continue;
        cubin->symbols = (const void *)(data + section->sh_offset);
        cubin->symbol_names = data + cubin->sections[section->sh_link].sh_offset;
    }
    return cubin->symbols != NULL;
}

static void add_function(struct CUmod_st *module, const struct cubin *cubin, unsigned symbol,
                         unsigned registers) {
    struct CUfunc_st *function = &module->functions[module->count++];
    const char *name = cubin->symbol_names + cubin->symbols[symbol].st_name;
    snprintf(function->name, sizeof function->name, "%s", name);
    function->registers = registers;
    function->leave = SHARED_WITHOUT_LEAVE;
    for (unsigned i = 0; i < cubin->count; i++) {
        const char *section = section_name(cubin, i);
        if (strncmp(section, ".nv.shared.", 11) == 0 && strcmp(section + 11, name) == 0)
            function->static_shared = cubin->sections[i].sh_size;
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *data) {
    struct cubin cubin;
    REFUSE_IF(!open_cubin(&cubin, data), "a module must be a cubin");
    *module = calloc(1, sizeof **module);
    for (unsigned i = 0; i < cubin.count; i++) {
        if (strcmp(section_name(&cubin, i), ".nv.info") != 0) continue;
        const char *at = cubin.data + cubin.sections[i].sh_offset;
        const char *end = at + cubin.sections[i].sh_size;
        while (at < end) {
            uint16_t size = at[0] == WITH_SIZE ? *(const uint16_t *)(at + 2) : 0;
            const uint32_t *values = (const void *)(at + 4);
            if (size && at[1] == REGISTER_COUNT && (*module)->count < KERNELS)
                add_function(*module, &cubin, values[0], values[1]);
            at += 4 + size;
        }
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    for (unsigned f = 0; f < module->count; f++)
        if (strcmp(module->functions[f].name, name) == 0)
            return *function = &module->functions[f], CUDA_SUCCESS;
    return refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in its module", name);
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; } /* its kernels are in the log */

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->static_shared; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = max_threads(function); break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break; /* the compiler's tests look */
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d is unknown here", attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    /* asked for by Triton 3.9, which then does without: no fault of a kernel's */
    if (attribute == SHARED_MEMORY_MODE) return CUDA_ERROR_INVALID_VALUE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    REFUSE_IF(value < 0 || value + function->static_shared > SHARED,
              "%s may not have %d bytes of shared memory of a block's %d", function->name, value,
              SHARED);
    function->leave = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function,
                                      const CUlaunchConfig *config) {
    return *count = 1, CUDA_SUCCESS;
}

/* -- tensor maps: the rules of cuTensorMapEncodeTiled in the driver's manual ------------------ */

static unsigned size_of(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 0;
    }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sides, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    unsigned size = size_of(type);
    REFUSE_IF(size == 0, "a tensor map's type must be a known one, got %d", type);
    REFUSE_IF((uintptr_t)map % 64, "a tensor map must lie at a multiple of 64 bytes");
    REFUSE_IF(rank < 1 || rank > DIMENSIONS, "a tensor map must have 1 to 5 dimensions, got %u",
              rank);
    REFUSE_IF(interleave != CU_TENSOR_MAP_INTERLEAVE_NONE, "interleaving is unknown here");
    REFUSE_IF((uintptr_t)address % 16, "an address must be a multiple of 16, got %p", address);
    for (unsigned i = 0; i < rank; i++) {
        REFUSE_IF(sides[i] == 0 || sides[i] > 1ull << 32,
                  "side %u must be 1 to 2^32 elements, got %llu", i, (long long)sides[i]);
        REFUSE_IF(box[i] == 0 || box[i] > BOX, "side %u of a box must be 1 to %d elements, got %u",
                  i, BOX, box[i]);
        REFUSE_IF(steps[i] == 0 || steps[i] > 8, "step %u must be 1 to 8, got %u", i, steps[i]);
    }
    uint64_t least = sides[0] * size;
    for (unsigned i = 0; i + 1 < rank; i++) {
        REFUSE_IF(strides[i] % 16, "stride %u must be a multiple of 16 bytes, got %llu", i,
                  (long long)strides[i]);
        REFUSE_IF(strides[i] >= 1ull << 40, "stride %u must be below 2^40 bytes, got %llu", i,
                  (long long)strides[i]);
        REFUSE_IF(strides[i] < least, "stride %u must be at least the %llu bytes it passes, got "
                  "%llu", i, (long long)least, (long long)strides[i]);
        least = strides[i] * sides[i + 1];
    }
    unsigned inner = box[0] * size, span = 0;
    REFUSE_IF(inner % 16, "a box's rows must be a multiple of 16 bytes, got %u", inner);
    switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: span = inner; break;
    case CU_TENSOR_MAP_SWIZZLE_32B: span = 32; break;
    case CU_TENSOR_MAP_SWIZZLE_64B: span = 64; break;
    case CU_TENSOR_MAP_SWIZZLE_128B: span = 128; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "swizzle %d is unknown here", swizzle);
    }
    REFUSE_IF(inner > span, "a box's rows must be at most the swizzle's %u bytes, got %u", span,
              inner);
    int is_integer = type <= CU_TENSOR_MAP_DATA_TYPE_INT64;
    REFUSE_IF(fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && is_integer, "integers have no NaN");

    struct tensor_map *made =
        next((void **)&tensor_maps, counters.tensor_maps, sizeof *tensor_maps);
    counters.tensor_maps++;
    made->address = (uintptr_t)address;
    made->type = type, made->rank = rank, made->swizzle = swizzle;
    memcpy(made->sides, sides, rank * sizeof *sides);
    memcpy(made->strides, strides, (rank - 1) * sizeof *strides);
    memcpy(made->box, box, rank * sizeof *box);
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

/* -- launches -------------------------------------------------------------------------------- */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments,
                          void **extra) {
    const char *name = function->name;
    unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    unsigned shared = config->sharedMemBytes;
    for (int i = 0; i < 3; i++) {
        unsigned most = i == 0 ? GRID_X : GRID_YZ;
        REFUSE_IF(grid[i] == 0 || grid[i] > most, "%s: side %d of a grid must be 1 to %u, got %u",
                  name, i, most, grid[i]);
        REFUSE_IF(block[i] == 0 || block[i] > (i < 2 ? THREADS : 64),
                  "%s: side %d of a block is %u", name, i, block[i]);
    }
    unsigned long long threads = (unsigned long long)block[0] * block[1] * block[2];
    REFUSE_IF(threads > THREADS, "%s: a block must have at most %d threads, got %llu", name,
              THREADS, threads);
    REFUSE_IF(shared > function->leave, "%s: %u bytes of dynamic shared memory, and leave for %u",
              name, shared, function->leave);
    REFUSE_IF(shared + function->static_shared > SHARED,
              "%s: a block must have at most %d bytes of shared memory, got %u", name, SHARED,
              shared + function->static_shared);
    if (threads > max_threads(function))
        return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                      "%s: %llu threads of %u registers are more than a block's %d", name, threads,
                      function->registers, REGISTERS);

    struct launch *made = next((void **)&launches, counters.launches, sizeof *launches);
    counters.launches++;
    made->tensor_maps = counters.tensor_maps;
    memcpy(made->grid, grid, sizeof grid);
    memcpy(made->block, block, sizeof block);
    made->shared = shared + function->static_shared, made->registers = function->registers;
    snprintf(made->name, sizeof made->name, "%s", name);
    return CUDA_SUCCESS;
}
