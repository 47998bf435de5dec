/* Byte pair encoding of UTF-8 text as sentencepiece does it; native_encoder.py builds the tables and calls this.

   Text is cut where two neighbouring characters stand together in no piece, since no merge can cross such a place. A
   stretch between two cuts is encoded on its own and remembered, because stretches repeat.
   Merging: of all neighbouring pairs that make a piece, the one with the best score first, the leftmost of equals. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NO_PIECE (-1)
#define WHITESPACE_SYMBOL 0x2581
#define CODE_POINTS 0x110000
#define PAIR_BITS 23
#define SHORT_STRETCH 64              /* up to here a scan finds the next merge sooner than a heap */
#define LONG_STRETCH (1 << 20)        /* from here on memory counts */
#define MAX_PASSES 64
#define CACHE_BITS 14                 /* 16 MiB in all */
#define CACHE_WAYS 2
#define CACHED_BYTES 30               /* longer stretches rarely repeat */
#define CACHED_IDS 8

typedef struct {                      /* two lines of the processor's cache, the key in the first */
    uint8_t num_bytes, num_ids, bytes[CACHED_BYTES];
    int32_t ids[CACHED_IDS];
} Entry;

typedef struct {
    int32_t *piece_of_char;           /* [CODE_POINTS]: the piece of a character, or NO_PIECE */
    uint64_t *pairs;                  /* a bit for each hash of two characters that stand together in a piece */
    uint8_t is_ascii_pair[128][128];  /* the same for ASCII, exactly */
    uint64_t *merge_keys;             /* [num_slots]: left << 32 | right, or all ones where empty */
    int32_t *merge_pieces;            /* [num_slots] */
    uint64_t slot_mask;
    int32_t *rank_of_piece;           /* 0 is merged first */
    int32_t byte_pieces[256];
    const uint8_t *symbol_bytes;      /* symbols of several characters, by their first two bytes, longest first */
    const int32_t *symbol_starts;     /* [num_symbols + 1] */
    const int32_t *symbol_pieces;
    int32_t *first_symbol;            /* [65537]: by first two bytes */
    uint8_t is_symbol_byte[256];
    Entry *cache;
    /* scratch for one stretch */
    int64_t capacity;
    int32_t *piece, *rank;
} Kernel;

typedef struct { int32_t rank, left, left_piece, right_piece; } Candidate;

typedef struct {                      /* the pieces of a stretch as a list, and the merges that may be next */
    int32_t *next, *previous;
    Candidate *candidates;
    int64_t size;
} Heap;

static uint64_t mix(uint64_t x) {
    x ^= x >> 32; x *= 0x9E3779B97F4A7C15ull; x ^= x >> 29;
    return x;
}

static uint64_t scramble(uint64_t hash, uint64_t word) { return mix(hash ^ word) * 0xC2B2AE3D27D4EB4Full; }

static uint32_t pair_slot(uint32_t left, uint32_t right) {
    uint64_t hash = (uint64_t)left * 0x9E3779B97F4A7C15ull + (uint64_t)right * 0xC2B2AE3D27D4EB4Full;
    return (uint32_t)(hash >> (64 - PAIR_BITS));
}

static int is_pair(const Kernel *k, uint32_t left, uint32_t right) {
    if ((left | right) < 128) return k->is_ascii_pair[left][right];
    uint32_t slot = pair_slot(left, right);
    return (int)(k->pairs[slot >> 6] >> (slot & 63) & 1);
}

static int32_t find_merge(const Kernel *k, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (uint64_t slot = mix(key) & k->slot_mask;; slot = (slot + 1) & k->slot_mask) {
        if (k->merge_keys[slot] == key) return k->merge_pieces[slot];
        if (k->merge_keys[slot] == UINT64_MAX) return NO_PIECE;
    }
}

static int32_t find_rank(const Kernel *k, int32_t left, int32_t right) {
    int32_t piece = find_merge(k, left, right);
    return piece == NO_PIECE ? INT32_MAX : k->rank_of_piece[piece];
}

/* Decode one character of valid UTF-8; a space is the whitespace symbol. Returns its number of bytes. */
static int decode(const uint8_t *s, uint32_t *code_point) {
    if (s[0] < 0x80) { *code_point = s[0] == ' ' ? WHITESPACE_SYMBOL : s[0]; return 1; }
    if (s[0] < 0xE0) { *code_point = (s[0] & 0x1Fu) << 6 | (s[1] & 0x3F); return 2; }
    if (s[0] < 0xF0) { *code_point = (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3F); return 3; }
    *code_point = (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3F);
    return 4;
}

/* The number of bytes of the longest symbol that begins here, 0 without one. */
static int64_t match_symbol(const Kernel *k, const uint8_t *s, int64_t left, int32_t *piece) {
    if (!k->is_symbol_byte[s[0]] || left < 2) return 0;
    int32_t pair = s[0] << 8 | s[1];
    for (int32_t i = k->first_symbol[pair]; i < k->first_symbol[pair + 1]; i++) {
        int32_t num_bytes = k->symbol_starts[i + 1] - k->symbol_starts[i];
        if (num_bytes <= left && memcmp(s, k->symbol_bytes + k->symbol_starts[i], (size_t)num_bytes) == 0) {
            *piece = k->symbol_pieces[i];
            return num_bytes;
        }
    }
    return 0;
}

static int reserve(Kernel *k, int64_t count) {
    if (count <= k->capacity) return 1;
    int64_t capacity = count < LONG_STRETCH ? 2 * count : count;
    free(k->piece);
    free(k->rank);
    k->piece = malloc((size_t)capacity * sizeof(int32_t));
    k->rank = malloc((size_t)capacity * sizeof(int32_t));
    k->capacity = k->piece && k->rank ? capacity : 0;
    return k->capacity > 0;
}

/* Merge piece[0, count) in place by scanning; returns how many are left. */
static int64_t merge_short(Kernel *k, int64_t count) {
    int32_t *piece = k->piece, *rank = k->rank;
    for (int64_t i = 0; i + 1 < count; i++) rank[i] = find_rank(k, piece[i], piece[i + 1]);
    while (count > 1) {
        int64_t best = 0;
        for (int64_t i = 1; i + 1 < count; i++) if (rank[i] < rank[best]) best = i;
        if (rank[best] == INT32_MAX) break;
        piece[best] = find_merge(k, piece[best], piece[best + 1]);
        size_t behind = (size_t)(count - best - 2) * sizeof(int32_t);
        memmove(piece + best + 1, piece + best + 2, behind);
        memmove(rank + best, rank + best + 1, (size_t)(count - best - 1) * sizeof(int32_t));
        count--;
        if (best + 1 < count) rank[best] = find_rank(k, piece[best], piece[best + 1]);
        if (best > 0) rank[best - 1] = find_rank(k, piece[best - 1], piece[best]);
    }
    return count;
}

/* Merge as long as one pass from left to right takes all merges of the best rank: the memory of a list is not needed
   yet. Stops where a merge brings about one that should come before the rest of its pass, or after MAX_PASSES. */
static int64_t merge_by_passes(Kernel *k, int64_t count) {
    int32_t *piece = k->piece;
    for (int pass = 0; pass < MAX_PASSES && count > 1; pass++) {
        int32_t best = INT32_MAX;
        for (int64_t i = 0; i + 1 < count; i++) {
            int32_t rank = i > 0 && piece[i] == piece[i - 1] && piece[i] == piece[i + 1]
                ? k->rank[i - 1] : find_rank(k, piece[i], piece[i + 1]);
            k->rank[i] = rank;
            if (rank < best) best = rank;
        }
        if (best == INT32_MAX) return count;
        int64_t kept = 0, i = 0;
        int is_interrupted = 0;
        while (i < count) {
            int is_merged = !is_interrupted && i + 1 < count && k->rank[i] == best;
            piece[kept] = is_merged ? find_merge(k, piece[i], piece[i + 1]) : piece[i];
            i += is_merged ? 2 : 1;
            if (is_merged && kept > 0 && find_rank(k, piece[kept - 1], piece[kept]) <= best) is_interrupted = 1;
            if (is_merged && i < count && find_rank(k, piece[kept], piece[i]) <= best) is_interrupted = 1;
            kept++;
        }
        count = kept;
    }
    return count;
}

static int is_before(Candidate a, Candidate b) { return a.rank != b.rank ? a.rank < b.rank : a.left < b.left; }

static void push(Heap *heap, Candidate candidate) {
    Candidate *all = heap->candidates;
    int64_t i = heap->size++;
    for (; i > 0 && is_before(candidate, all[(i - 1) / 2]); i = (i - 1) / 2) all[i] = all[(i - 1) / 2];
    all[i] = candidate;
}

static Candidate pop(Heap *heap) {
    Candidate *all = heap->candidates, top = all[0], last = all[--heap->size];
    int64_t i = 0, child;
    for (; (child = 2 * i + 1) < heap->size; i = child) {
        if (child + 1 < heap->size && is_before(all[child + 1], all[child])) child++;
        if (!is_before(all[child], last)) break;
        all[i] = all[child];
    }
    all[i] = last;
    return top;
}

static void consider(const Kernel *k, Heap *heap, int32_t left) {
    if (left < 0 || heap->next[left] < 0) return;
    int32_t a = k->piece[left], b = k->piece[heap->next[left]], rank = find_rank(k, a, b);
    if (rank != INT32_MAX) push(heap, (Candidate){rank, left, a, b});
}

static int64_t merge_list(Kernel *k, Heap *heap, int64_t count) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        heap->previous[i] = (int32_t)(i - 1);
        heap->next[i] = i + 1 < count ? (int32_t)(i + 1) : -1;
    }
    for (int64_t i = 0; i < count; i++) consider(k, heap, (int32_t)i);
    while (heap->size > 0) {
        Candidate best = pop(heap);
        int32_t right = heap->next[best.left];
        if (right < 0 || k->piece[best.left] != best.left_piece || k->piece[right] != best.right_piece) continue;
        k->piece[best.left] = find_merge(k, best.left_piece, best.right_piece);
        k->piece[right] = NO_PIECE;
        heap->next[best.left] = heap->next[right];
        heap->next[right] = -1;
        if (heap->next[best.left] >= 0) heap->previous[heap->next[best.left]] = best.left;
        consider(k, heap, heap->previous[best.left]);
        consider(k, heap, best.left);
    }
    for (int32_t i = 0; i >= 0; i = heap->next[i]) k->piece[kept++] = k->piece[i];
    return kept;
}

/* The same as merge_short for many pieces, with a heap of candidates of which outdated ones are skipped; -1 without
   memory. */
static int64_t merge_long(Kernel *k, int64_t count) {
    if (count >= LONG_STRETCH) count = merge_by_passes(k, count);
    Heap heap = {malloc((size_t)count * sizeof(int32_t)), malloc((size_t)count * sizeof(int32_t)),
                 malloc((size_t)(3 * count) * sizeof(Candidate)), 0};
    int64_t kept = heap.next && heap.previous && heap.candidates ? merge_list(k, &heap, count) : -1;
    free(heap.next);
    free(heap.previous);
    free(heap.candidates);
    return kept;
}

/* Encode the stretch of `count` characters in s[0, num_bytes), all of which are pieces; -1 without memory. */
static int64_t encode_stretch(Kernel *k, const uint8_t *s, int64_t num_bytes, int64_t count, int32_t *ids) {
    if (!reserve(k, count)) return -1;
    uint32_t code_point;
    for (int64_t i = 0, at = 0; at < num_bytes; i++) {
        at += decode(s + at, &code_point);
        k->piece[i] = k->piece_of_char[code_point];
    }
    int64_t num_ids = count <= SHORT_STRETCH ? merge_short(k, count) : merge_long(k, count);
    if (num_ids > 0) memcpy(ids, k->piece, (size_t)num_ids * sizeof(int32_t));
    if (count >= LONG_STRETCH) {
        free(k->piece);
        free(k->rank);
        k->piece = k->rank = NULL;
        k->capacity = 0;
    }
    return num_ids;
}

static int64_t look_up_stretch(Kernel *k, const uint8_t *s, int64_t num_bytes, int64_t count, int32_t *ids) {
    if (num_bytes > CACHED_BYTES) return encode_stretch(k, s, num_bytes, count, ids);
    uint64_t hash = (uint64_t)num_bytes, word;
    int64_t at = 0;
    for (; at + 8 <= num_bytes; at += 8) { memcpy(&word, s + at, 8); hash = scramble(hash, word); }
    for (word = 0; at < num_bytes; at++) word = word << 8 | s[at];
    hash = scramble(hash, word);
    Entry *set = k->cache + (hash >> (64 - CACHE_BITS)) * CACHE_WAYS;
    for (Entry *entry = set; entry < set + CACHE_WAYS; entry++) {
        if (entry->num_bytes == num_bytes && memcmp(entry->bytes, s, (size_t)num_bytes) == 0) {
            memcpy(ids, entry->ids, sizeof(entry->ids));
            return entry->num_ids;
        }
    }
    int64_t num_ids = encode_stretch(k, s, num_bytes, count, ids);
    if (num_ids >= 0 && num_ids <= CACHED_IDS) {
        set[1] = set[0];
        set->num_bytes = (uint8_t)num_bytes; set->num_ids = (uint8_t)num_ids;
        memcpy(set->bytes, s, (size_t)num_bytes);
        memcpy(set->ids, ids, (size_t)num_ids * sizeof(int32_t));
    }
    return num_ids;
}

/* Encode one text; ids holds at least num_bytes + CACHED_IDS entries. Returns the number of ids, -1 without memory. */
static int64_t encode_text(Kernel *k, const uint8_t *s, int64_t num_bytes, int32_t *ids) {
    int64_t num_ids = 0, start = 0, count = 0, at = 0;
    uint32_t last = 0, code_point;
    while (at <= num_bytes) {
        int32_t symbol = NO_PIECE, piece = NO_PIECE;
        int64_t symbol_bytes = 0;
        int width = 0, is_joined = 0;
        if (at < num_bytes) {
            symbol_bytes = match_symbol(k, s + at, num_bytes - at, &symbol);
            if (!symbol_bytes) {
                width = decode(s + at, &code_point);
                piece = k->piece_of_char[code_point];
                is_joined = count > 0 && piece != NO_PIECE && is_pair(k, last, code_point);
            }
        }
        if (!is_joined && count > 0) {
            int64_t found = look_up_stretch(k, s + start, at - start, count, ids + num_ids);
            if (found < 0) return -1;
            num_ids += found;
            count = 0;
        }
        if (at == num_bytes) break;
        if (symbol_bytes) { ids[num_ids++] = symbol; at += symbol_bytes; continue; }
        if (piece == NO_PIECE) {
            for (int i = 0; i < width; i++) ids[num_ids++] = k->byte_pieces[s[at + i]];
        } else {
            if (count == 0) start = at;
            count++;
            last = code_point;
        }
        at += width;
    }
    return num_ids;
}

const int64_t kernel_spare_ids = CACHED_IDS;  /* what the ids of a call must hold beyond one for each byte */

/* texts: the bytes of all texts, text i at [starts[i], starts[i + 1]). Returns the number of ids, -1 without memory. */
int64_t kernel_encode(Kernel *k, const uint8_t *texts, const int64_t *starts, int64_t num_texts, int32_t *ids,
                      int64_t *num_ids_of_text) {
    int64_t num_ids = 0;
    for (int64_t i = 0; i < num_texts; i++) {
        int64_t found = encode_text(k, texts + starts[i], starts[i + 1] - starts[i], ids + num_ids);
        if (found < 0) return -1;
        num_ids_of_text[i] = found;
        num_ids += found;
    }
    return num_ids;
}

/* Zeroed memory for a table that is read all over, in large pages where the system has them. */
static void *allocate_table(size_t num_bytes) {
    const size_t page = (size_t)1 << 21;
    num_bytes = (num_bytes + page - 1) / page * page;
    void *table = aligned_alloc(page, num_bytes);
    if (!table) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(table, num_bytes, MADV_HUGEPAGE);
#endif
    return memset(table, 0, num_bytes);
}

void kernel_free(Kernel *k) {
    void *owned[] = {k->piece_of_char, k->pairs, k->merge_keys, k->merge_pieces, k->rank_of_piece, k->first_symbol,
                     k->cache, k->piece, k->rank, k};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++) free(owned[i]);
}

/* All arrays but those of the symbols are copied. Returns NULL without memory. */
Kernel *kernel_build(const uint32_t *chars, const int32_t *char_pieces, int64_t num_chars, const uint32_t *pairs,
                     int64_t num_pairs, const int32_t *lefts, const int32_t *rights, const int32_t *merged,
                     int64_t num_merges, const int32_t *rank_of_piece, int64_t num_pieces, const int32_t *byte_pieces,
                     const uint8_t *symbol_bytes, const int32_t *symbol_starts, const int32_t *symbol_pieces,
                     int64_t num_symbols) {
    Kernel *k = calloc(1, sizeof(Kernel));
    if (!k) return NULL;
    uint64_t num_slots = 1024;
    while (num_slots < 2 * (uint64_t)num_merges) num_slots *= 2;
    k->slot_mask = num_slots - 1;
    k->piece_of_char = malloc(CODE_POINTS * sizeof(int32_t));
    k->pairs = allocate_table(((size_t)1 << (PAIR_BITS - 6)) * sizeof(uint64_t));
    k->merge_keys = malloc(num_slots * sizeof(uint64_t));
    k->merge_pieces = malloc(num_slots * sizeof(int32_t));
    k->rank_of_piece = malloc((size_t)num_pieces * sizeof(int32_t));
    k->first_symbol = calloc(65537, sizeof(int32_t));
    k->cache = allocate_table(sizeof(Entry) * CACHE_WAYS << CACHE_BITS);
    if (!k->piece_of_char || !k->pairs || !k->merge_keys || !k->merge_pieces || !k->rank_of_piece || !k->first_symbol ||
        !k->cache) {
        kernel_free(k);
        return NULL;
    }
    memset(k->piece_of_char, 0xFF, CODE_POINTS * sizeof(int32_t));
    for (int64_t i = 0; i < num_chars; i++) k->piece_of_char[chars[i]] = char_pieces[i];
    for (int64_t i = 0; i < num_pairs; i++) {
        if ((pairs[2 * i] | pairs[2 * i + 1]) < 128) k->is_ascii_pair[pairs[2 * i]][pairs[2 * i + 1]] = 1;
        uint32_t slot = pair_slot(pairs[2 * i], pairs[2 * i + 1]);
        k->pairs[slot >> 6] |= 1ull << (slot & 63);
    }
    memset(k->merge_keys, 0xFF, num_slots * sizeof(uint64_t));
    for (int64_t i = 0; i < num_merges; i++) {
        uint64_t key = (uint64_t)(uint32_t)lefts[i] << 32 | (uint32_t)rights[i], slot = mix(key) & k->slot_mask;
        while (k->merge_keys[slot] != UINT64_MAX) slot = (slot + 1) & k->slot_mask;
        k->merge_keys[slot] = key;
        k->merge_pieces[slot] = merged[i];
    }
    memcpy(k->rank_of_piece, rank_of_piece, (size_t)num_pieces * sizeof(int32_t));
    memcpy(k->byte_pieces, byte_pieces, sizeof(k->byte_pieces));
    k->symbol_bytes = symbol_bytes; k->symbol_starts = symbol_starts; k->symbol_pieces = symbol_pieces;
    for (int64_t i = 0; i < num_symbols; i++) {
        const uint8_t *s = symbol_bytes + symbol_starts[i];
        k->is_symbol_byte[s[0]] = 1;
        k->first_symbol[(s[0] << 8 | s[1]) + 1]++;
    }
    for (int i = 0; i < 65536; i++) k->first_symbol[i + 1] += k->first_symbol[i];
    return k;
}
