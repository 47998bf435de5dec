/* Byte pair encoding of UTF-8 text as sentencepiece does it; native_encoder.py builds the tables and calls this.

   Text is cut where two neighbouring characters stand together in no piece, since no merge can cross such a place. A
   stretch between two cuts is encoded on its own and remembered, because stretches repeat.
   Merging: of all neighbouring pairs that make a piece, the one with the best score first, the leftmost of equals. */

#ifdef Py_LIMITED_API  /* built by pip: see setup.py */
#include <Python.h>

/* The functions are called through ctypes. The module is empty; it is there so that the library can be imported. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "bpe_kernel", .m_size = -1};
PyMODINIT_FUNC PyInit_bpe_kernel(void) { return PyModule_Create(&module); }

const char kernel_source_sha256[] = SOURCE_SHA256;  /* by which a library of another source is told apart */
#endif

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
#define KEY_WORDS 4                   /* their bytes, and in the next byte how many; reading a key may pass their end */
#define CACHED_IDS 8
#define CHARS_AHEAD 64                /* read before the first of them is used: their memory is on its way meanwhile */
#define STRETCHES_AHEAD 16            /* the same for stretches */
#define NO_CHAR UINT32_MAX

typedef struct { uint64_t words[KEY_WORDS]; } Key;

typedef struct {                      /* a line of the processor's cache; num_ids is the last byte of the key */
    Key key;
    int32_t ids[CACHED_IDS];
} Entry;

typedef struct { uint64_t key; int32_t piece, rank; } Merge;  /* left << 32 | right, or all ones where empty */

typedef struct {
    int32_t *piece_of_char;           /* [CODE_POINTS]: the piece of a character, or NO_PIECE */
    uint64_t *pairs;                  /* a bit for each hash of two characters that stand together in a piece */
    uint8_t is_ascii_pair[128][128];  /* the same for ASCII, exactly */
    Merge *merges;                    /* [slot_mask + 1]; rank 0 is merged first */
    uint64_t slot_mask;
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

/* How a character stands to the one before it; a symbol or one without a piece is no part of a stretch. */
typedef enum { APART, JOINED, JOINED_IF_PAIR, SYMBOL, SPELT_IN_BYTES } Link;

typedef struct { Link link; uint32_t pair_slot; int32_t piece, num_bytes; } Char;

typedef struct {                      /* of `count` characters; with none it is the id `piece` */
    const uint8_t *s;
    int64_t num_bytes, count;
    Key key;
    Entry *set;
    int32_t piece;
} Stretch;

typedef struct {                      /* the ids of one text, and what still waits to be encoded */
    int32_t *ids;
    int64_t num_ids;
    int num_waiting;
    Stretch waiting[STRETCHES_AHEAD];
} Output;

typedef struct { int32_t rank, left, left_piece, right_piece; } Candidate;

typedef struct {                      /* the pieces of a stretch as a list, and the merges that may be next */
    int32_t *next, *previous;
    Candidate *candidates;
    int64_t size;
} Heap;

static uint64_t word_masks[CACHED_BYTES + 1][KEY_WORDS];  /* the bits of a key's words that its bytes fill */

static void fill_word_masks(void) {
    for (int num_bytes = 0; num_bytes <= CACHED_BYTES; num_bytes++) {
        for (int i = 0; i < KEY_WORDS; i++) {
            int in_word = num_bytes - 8 * i;
            word_masks[num_bytes][i] = in_word >= 8 ? UINT64_MAX : in_word > 0 ? (1ull << (8 * in_word)) - 1 : 0;
        }
    }
}

static uint64_t mix(uint64_t x) {
    x ^= x >> 32; x *= 0x9E3779B97F4A7C15ull; x ^= x >> 29;
    return x;
}

static uint32_t pair_slot(uint32_t left, uint32_t right) {
    uint64_t hash = (uint64_t)left * 0x9E3779B97F4A7C15ull + (uint64_t)right * 0xC2B2AE3D27D4EB4Full;
    return (uint32_t)(hash >> (64 - PAIR_BITS));
}

/* The merge of two pieces; its rank is INT32_MAX where there is none. */
static Merge find_merge(const Kernel *k, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (uint64_t slot = mix(key) & k->slot_mask;; slot = (slot + 1) & k->slot_mask) {
        if (k->merges[slot].key == key || k->merges[slot].key == UINT64_MAX) return k->merges[slot];
    }
}

static int32_t find_rank(const Kernel *k, int32_t left, int32_t right) { return find_merge(k, left, right).rank; }

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
    int32_t *piece = k->piece;
    struct { int32_t rank, piece; } merge[SHORT_STRETCH];
    Merge found;
    for (int64_t i = 0; i + 1 < count; i++) {
        found = find_merge(k, piece[i], piece[i + 1]);
        merge[i].rank = found.rank; merge[i].piece = found.piece;
    }
    while (count > 1) {
        int64_t best = 0;
        for (int64_t i = 1; i + 1 < count; i++) if (merge[i].rank < merge[best].rank) best = i;
        if (merge[best].rank == INT32_MAX) break;
        piece[best] = merge[best].piece;
        memmove(piece + best + 1, piece + best + 2, (size_t)(count - best - 2) * sizeof(piece[0]));
        memmove(merge + best, merge + best + 1, (size_t)(count - best - 2) * sizeof(merge[0]));
        count--;
        if (best + 1 < count) {
            found = find_merge(k, piece[best], piece[best + 1]);
            merge[best].rank = found.rank; merge[best].piece = found.piece;
        }
        if (best > 0) {
            found = find_merge(k, piece[best - 1], piece[best]);
            merge[best - 1].rank = found.rank; merge[best - 1].piece = found.piece;
        }
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
            piece[kept] = is_merged ? find_merge(k, piece[i], piece[i + 1]).piece : piece[i];
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
        k->piece[best.left] = find_merge(k, best.left_piece, best.right_piece).piece;
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

/* Reads 8 * KEY_WORDS bytes whatever num_bytes is: no branch that the processor would have to guess. */
static void build_key(Key *key, const uint8_t *s, int64_t num_bytes) {
    memcpy(key->words, s, sizeof(key->words));
    for (int i = 0; i < KEY_WORDS; i++) key->words[i] &= word_masks[num_bytes][i];
    key->words[KEY_WORDS - 1] |= (uint64_t)num_bytes << 48;
}

static Entry *find_set(const Kernel *k, const Key *key) {
    uint64_t hash = key->words[0] * 0x9E3779B97F4A7C15ull ^ key->words[1] * 0xC2B2AE3D27D4EB4Full
                  ^ key->words[2] * 0x165667B19E3779F9ull ^ key->words[3] * 0xD6E8FEB86659FD93ull;
    hash = (hash ^ hash >> 32) * 0x9E3779B97F4A7C15ull;
    return k->cache + (hash >> (64 - CACHE_BITS)) * CACHE_WAYS;
}

static int is_same_key(const Key *stored, const Key *key) {
    uint64_t difference = (stored->words[KEY_WORDS - 1] ^ key->words[KEY_WORDS - 1]) << 8;
    for (int i = 0; i < KEY_WORDS - 1; i++) difference |= stored->words[i] ^ key->words[i];
    return difference == 0;
}

static int64_t look_up_stretch(Kernel *k, const Stretch *stretch, int32_t *ids) {
    if (stretch->num_bytes > CACHED_BYTES) {
        return encode_stretch(k, stretch->s, stretch->num_bytes, stretch->count, ids);
    }
    for (const Entry *entry = stretch->set; entry < stretch->set + CACHE_WAYS; entry++) {
        if (is_same_key(&entry->key, &stretch->key)) {
            memcpy(ids, entry->ids, sizeof(entry->ids));
            return (int64_t)(entry->key.words[KEY_WORDS - 1] >> 56);
        }
    }
    int64_t num_ids = encode_stretch(k, stretch->s, stretch->num_bytes, stretch->count, ids);
    if (num_ids >= 0 && num_ids <= CACHED_IDS) {
        stretch->set[1] = stretch->set[0];
        stretch->set->key = stretch->key;
        stretch->set->key.words[KEY_WORDS - 1] |= (uint64_t)num_ids << 56;
        memcpy(stretch->set->ids, ids, (size_t)num_ids * sizeof(int32_t));
    }
    return num_ids;
}

/* Encode what waits, in order; 0 without memory. */
static int flush(Kernel *k, Output *out) {
    for (int i = 0; i < out->num_waiting; i++) {
        const Stretch *stretch = out->waiting + i;
        if (stretch->count == 0) { out->ids[out->num_ids++] = stretch->piece; continue; }
        int64_t found = look_up_stretch(k, stretch, out->ids + out->num_ids);
        if (found < 0) return 0;
        out->num_ids += found;
    }
    out->num_waiting = 0;
    return 1;
}

/* The place of the next stretch, or NULL without memory to encode those before it. */
static Stretch *add_stretch(Kernel *k, Output *out) {
    if (out->num_waiting == STRETCHES_AHEAD && !flush(k, out)) return NULL;
    return out->waiting + out->num_waiting++;
}

static int add_text(Kernel *k, Output *out, const uint8_t *s, int64_t num_bytes, int64_t count) {
    Stretch *stretch = add_stretch(k, out);
    if (!stretch) return 0;
    stretch->s = s; stretch->num_bytes = num_bytes; stretch->count = count;
    if (num_bytes > CACHED_BYTES) return 1;
    build_key(&stretch->key, s, num_bytes);
    stretch->set = find_set(k, &stretch->key);
    for (int way = 0; way < CACHE_WAYS; way++) __builtin_prefetch(stretch->set + way);
    return 1;
}

static int add_id(Kernel *k, Output *out, int32_t id) {
    Stretch *stretch = add_stretch(k, out);
    if (!stretch) return 0;
    stretch->count = 0; stretch->piece = id;
    return 1;
}

/* Read characters and symbols from `s` on until there are CHARS_AHEAD or the text ends. last: the character before `s`
   that may be joined to the first, or NO_CHAR; afterwards the last one read. Returns how many were read. */
static int read_chars(const Kernel *k, const uint8_t *s, int64_t num_bytes, uint32_t *last, Char *chars) {
    int num_chars = 0;
    for (int64_t at = 0; at < num_bytes && num_chars < CHARS_AHEAD; num_chars++) {
        Char *c = chars + num_chars;
        uint32_t code_point;
        c->num_bytes = (int32_t)match_symbol(k, s + at, num_bytes - at, &c->piece);
        c->link = SYMBOL;
        if (!c->num_bytes) {
            c->num_bytes = decode(s + at, &code_point);
            c->piece = k->piece_of_char[code_point];
            c->link = APART;
            if (c->piece == NO_PIECE) {
                c->link = SPELT_IN_BYTES;
            } else if (*last != NO_CHAR && (*last | code_point) < 128) {
                c->link = k->is_ascii_pair[*last][code_point] ? JOINED : APART;
            } else if (*last != NO_CHAR) {
                c->link = JOINED_IF_PAIR;
                c->pair_slot = pair_slot(*last, code_point);
                __builtin_prefetch(k->pairs + (c->pair_slot >> 6));
            }
        }
        *last = c->link <= JOINED_IF_PAIR ? code_point : NO_CHAR;
        at += c->num_bytes;
    }
    return num_chars;
}

static int is_joined(const Kernel *k, const Char *c) {
    if (c->link != JOINED_IF_PAIR) return c->link == JOINED;
    return (int)(k->pairs[c->pair_slot >> 6] >> (c->pair_slot & 63) & 1);
}

/* Encode one text; ids holds at least num_bytes + CACHED_IDS entries. Returns the number of ids, -1 without memory. */
static int64_t encode_text(Kernel *k, const uint8_t *s, int64_t num_bytes, int32_t *ids) {
    Output out;
    Char chars[CHARS_AHEAD];
    const uint8_t *start = s;
    int64_t count = 0;
    uint32_t last = NO_CHAR;
    out.ids = ids;
    out.num_ids = out.num_waiting = 0;
    for (const uint8_t *end = s + num_bytes; s < end;) {
        int num_chars = read_chars(k, s, end - s, &last, chars);
        for (const Char *c = chars; c < chars + num_chars; s += c->num_bytes, c++) {
            if (!is_joined(k, c)) {
                if (count > 0 && !add_text(k, &out, start, s - start, count)) return -1;
                start = s;
                count = 0;
            }
            if (c->link == SYMBOL) {
                if (!add_id(k, &out, c->piece)) return -1;
            } else if (c->link == SPELT_IN_BYTES) {
                for (int i = 0; i < c->num_bytes; i++) if (!add_id(k, &out, k->byte_pieces[s[i]])) return -1;
            } else {
                count++;
            }
        }
    }
    if (count > 0 && !add_text(k, &out, start, s - start, count)) return -1;
    return flush(k, &out) ? out.num_ids : -1;
}

const int64_t kernel_spare_ids = CACHED_IDS;     /* what the ids of a call must hold beyond one for each byte */
const int64_t kernel_spare_bytes = sizeof(Key);  /* what must be readable behind the last text */

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
    void *owned[] = {k->piece_of_char, k->pairs, k->merges, k->first_symbol, k->cache, k->piece, k->rank, k};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++) free(owned[i]);
}

/* All arrays but those of the symbols are copied. Returns NULL without memory. */
Kernel *kernel_build(const uint32_t *chars, const int32_t *char_pieces, int64_t num_chars, const uint32_t *pairs,
                     int64_t num_pairs, const int32_t *lefts, const int32_t *rights, const int32_t *merged,
                     const int32_t *rank_of_piece, int64_t num_merges, const int32_t *byte_pieces,
                     const uint8_t *symbol_bytes, const int32_t *symbol_starts, const int32_t *symbol_pieces,
                     int64_t num_symbols) {
    fill_word_masks();
    Kernel *k = calloc(1, sizeof(Kernel));
    if (!k) return NULL;
    uint64_t num_slots = 1024;
    while (num_slots < 2 * (uint64_t)num_merges) num_slots *= 2;
    k->slot_mask = num_slots - 1;
    k->piece_of_char = malloc(CODE_POINTS * sizeof(int32_t));
    k->pairs = allocate_table(((size_t)1 << (PAIR_BITS - 6)) * sizeof(uint64_t));
    k->merges = allocate_table(num_slots * sizeof(Merge));
    k->first_symbol = calloc(65537, sizeof(int32_t));
    k->cache = allocate_table(sizeof(Entry) * CACHE_WAYS << CACHE_BITS);
    if (!k->piece_of_char || !k->pairs || !k->merges || !k->first_symbol || !k->cache) {
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
    for (uint64_t slot = 0; slot < num_slots; slot++) k->merges[slot] = (Merge){UINT64_MAX, NO_PIECE, INT32_MAX};
    for (int64_t i = 0; i < num_merges; i++) {
        uint64_t key = (uint64_t)(uint32_t)lefts[i] << 32 | (uint32_t)rights[i], slot = mix(key) & k->slot_mask;
        while (k->merges[slot].key != UINT64_MAX) slot = (slot + 1) & k->slot_mask;
        k->merges[slot] = (Merge){key, merged[i], rank_of_piece[merged[i]]};
    }
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
