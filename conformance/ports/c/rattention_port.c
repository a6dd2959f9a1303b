/* RAttention in plain C: a port of the forward operations, and the worked example of docs/porting.md.
 *
 *     cc -O2 -o rattention_port rattention_port.c -lm
 *     rattention conform exec:./rattention_port
 *
 * The program reads one JSON request per line from stdin and writes one JSON answer per line to stdout; tensors travel
 * in safetensors files named by the request. Three parts, in this order: JSON and safetensors, the operations, the
 * protocol. All arithmetic is float32, in the recurrent form: one state per key/value head, into which each token is
 * folded as it leaves the window.
 *
 * Compiled with -DFAULT=n it is wrong on purpose, for the tests of the suite; see the uses of FAULT.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef FAULT
#define FAULT 0
#endif

static void *need(size_t size) {
  void *p = calloc(size ? size : 1, 1);
  if (!p) { fprintf(stderr, "out of memory: %zu bytes\n", size); exit(1); }
  return p;
}

/* ------------------------------------------------------------------------------------------------ JSON */

typedef enum { NUL, BOOL, NUMBER, STRING, ARRAY, OBJECT } Kind;
typedef struct Json {
  Kind kind;
  double number;           /* NUMBER, and 0 or 1 for BOOL */
  char *text;              /* STRING */
  char *key;               /* name of a member of an object */
  struct Json *child, *next;
} Json;

static const char *at; /* next character of the text being parsed */
static void blank(void) { while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r') at++; }

static unsigned hex4(void) {
  unsigned x = 0;
  for (int i = 0; i < 4 && *at; i++, at++)
    x = x * 16 + (unsigned)(*at <= '9' ? *at - '0' : (*at | 32) - 'a' + 10);
  return x;
}

static char *utf8(char *out, unsigned c) {
  if (c < 0x80) { *out++ = (char)c; return out; }
  if (c < 0x800) { *out++ = (char)(0xC0 | c >> 6); }
  else if (c < 0x10000) { *out++ = (char)(0xE0 | c >> 12); *out++ = (char)(0x80 | (c >> 6 & 63)); }
  else {
    *out++ = (char)(0xF0 | c >> 18); *out++ = (char)(0x80 | (c >> 12 & 63)); *out++ = (char)(0x80 | (c >> 6 & 63));
  }
  *out++ = (char)(0x80 | (c & 63));
  return out;
}

static char *parse_string(void) {
  char *text = need(strlen(at) + 1), *out = text; /* escapes only shrink */
  for (at++; *at && *at != '"';) {
    if (*at != '\\') { *out++ = *at++; continue; }
    char c = *++at;
    if (c) at++;
    if (c == 'u') {
      unsigned u = hex4();
      if (u >= 0xD800 && u < 0xDC00 && at[0] == '\\' && at[1] == 'u') {
        at += 2;
        u = 0x10000 + ((u - 0xD800) << 10) + (hex4() - 0xDC00);
      }
      out = utf8(out, u);
    } else *out++ = c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c == 'b' ? '\b' : c == 'f' ? '\f' : c;
  }
  if (*at) at++;
  return text;
}

static Json *parse(void) {
  Json *j = need(sizeof *j);
  blank();
  if (*at == '{' || *at == '[') {
    char close = *at == '{' ? '}' : ']';
    Json **tail = &j->child;
    j->kind = *at++ == '{' ? OBJECT : ARRAY;
    for (blank(); *at && *at != close; blank()) {
      char *key = NULL;
      if (j->kind == OBJECT) { key = parse_string(); blank(); if (*at == ':') at++; }
      *tail = parse();
      (*tail)->key = key;
      tail = &(*tail)->next;
      blank();
      if (*at == ',') at++;
    }
    if (*at) at++;
  } else if (*at == '"') { j->kind = STRING; j->text = parse_string(); }
  else if (*at == 't') { j->kind = BOOL; j->number = 1; at += 4; }
  else if (*at == 'f') { j->kind = BOOL; at += 5; }
  else if (*at == 'n') at += 4;
  else {
    char *end;
    j->kind = NUMBER;
    j->number = strtod(at, &end);
    if (end == at) { fprintf(stderr, "not JSON: %.40s\n", at); exit(1); }
    at = end;
  }
  return j;
}

static Json *read_json(const char *text) { at = text; return parse(); }

static Json *member(Json *j, const char *key) {
  for (Json *c = j ? j->child : NULL; c; c = c->next) if (c->key && !strcmp(c->key, key)) return c;
  return NULL;
}

static const char *string_of(Json *j, const char *key) {
  Json *m = member(j, key);
  return m && m->kind == STRING ? m->text : "";
}

static void discard(Json *j) {
  while (j) { Json *next = j->next; discard(j->child); free(j->text); free(j->key); free(j); j = next; }
}

/* ------------------------------------------------------------------------------------------------ safetensors */

typedef enum { F32, F16, BF16, I32 } Dtype;
static const char *const CODES[] = {"F32", "F16", "BF16", "I32"};
static const int WIDTHS[] = {4, 2, 2, 4};

typedef struct { char name[40]; Dtype dtype; int rank; long shape[4], count; float *x; int32_t *i; } Tensor;
typedef struct { int count; Tensor t[32]; } Tensors;

static float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) { float x = ldexpf((float)mantissa, -24); return sign ? -x : x; }
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static uint16_t to_half(float x) { /* to nearest, ties to even */
  uint16_t sign = (uint16_t)(to_bits(x) >> 16 & 0x8000);
  float a = fabsf(x);
  if (isnan(x)) return sign | 0x7E00;
  if (a >= 65520.0f) return sign | 0x7C00;
  if (a < 6.103515625e-05f) return sign | (uint16_t)nearbyintf(ldexpf(a, 24)); /* subnormal; 1024 is the first normal */
  uint32_t bits = to_bits(a);
  bits += 0xFFF + (bits >> 13 & 1);
  return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

static uint16_t to_bfloat(float x) {
  uint32_t bits = to_bits(x);
  if (isnan(x)) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static Tensor *find(Tensors *all, const char *name) {
  for (int n = 0; n < all->count; n++) if (!strcmp(all->t[n].name, name)) return &all->t[n];
  return NULL;
}

static Tensor *add(Tensors *all, const char *name, Dtype dtype, int rank, const long *shape) {
  if (all->count == 32) { fprintf(stderr, "more than 32 tensors\n"); exit(1); }
  Tensor *t = &all->t[all->count++];
  memset(t, 0, sizeof *t);
  snprintf(t->name, sizeof t->name, "%s", name);
  t->dtype = dtype, t->rank = rank, t->count = 1;
  for (int a = 0; a < rank; a++) t->count *= t->shape[a] = shape[a];
  if (dtype == I32) t->i = need(sizeof(int32_t) * (size_t)t->count);
  else t->x = need(sizeof(float) * (size_t)t->count);
  return t;
}

static void release(Tensors *all) {
  for (int n = 0; n < all->count; n++) free(all->t[n].x), free(all->t[n].i);
  all->count = 0;
}

/* Reads every tensor as float32, or int32. Returns NULL, or what is wrong. */
static const char *load(const char *path, Tensors *all) {
  FILE *file = fopen(path, "rb");
  if (!file) return "cannot open the tensor file";
  uint64_t size = 0; /* little-endian, as this machine is taken to be */
  if (fread(&size, 8, 1, file) != 1 || size > 1 << 26) { fclose(file); return "not a safetensors file"; }
  char *header = need(size + 1);
  if (fread(header, 1, size, file) != size) { fclose(file); free(header); return "truncated header"; }
  Json *j = read_json(header);
  const char *fault = NULL;
  for (Json *e = j->child; e && !fault; e = e->next) {
    if (!strcmp(e->key, "__metadata__")) continue;
    long shape[4] = {0};
    int rank = 0, dtype = 0;
    for (Json *s = member(e, "shape")->child; s && rank < 4; s = s->next) shape[rank++] = (long)s->number;
    while (dtype < 4 && strcmp(CODES[dtype], string_of(e, "dtype"))) dtype++;
    if (dtype == 4) { fault = "a dtype other than F32, F16, BF16, I32"; break; }
    Tensor *t = add(all, e->key, (Dtype)dtype, rank, shape);
    size_t bytes = (size_t)t->count * (size_t)WIDTHS[dtype];
    uint8_t *raw = need(bytes);
    fseek(file, (long)(8 + size) + (long)member(e, "data_offsets")->child->number, SEEK_SET);
    if (fread(raw, 1, bytes, file) != bytes) fault = "truncated data";
    for (long n = 0; n < t->count; n++) {
      uint16_t half;
      memcpy(&half, raw + 2 * n, 2);
      if (dtype == I32) memcpy(&t->i[n], raw + 4 * n, 4);
      else if (dtype == F32) memcpy(&t->x[n], raw + 4 * n, 4);
      else t->x[n] = dtype == F16 ? from_half(half) : from_bits((uint32_t)half << 16);
    }
    free(raw);
  }
  discard(j);
  free(header);
  fclose(file);
  return fault;
}

/* Writes every tensor in its own dtype, rounding once. */
static const char *save(const char *path, Tensors *all) {
  char header[8192];
  size_t length = 0, offset = 0;
#define PRINT(...) length += (size_t)snprintf(header + length, sizeof header - length, __VA_ARGS__)
  PRINT("{");
  for (int n = 0; n < all->count; n++) {
    Tensor *t = &all->t[n];
    size_t bytes = (size_t)t->count * (size_t)WIDTHS[t->dtype];
    PRINT("%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", n ? "," : "", t->name, CODES[t->dtype]);
    for (int a = 0; a < t->rank; a++) PRINT("%s%ld", a ? "," : "", t->shape[a]);
    PRINT("],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes);
    offset += bytes;
  }
  PRINT("}");
#undef PRINT
  while (length % 8) header[length++] = ' ';
  FILE *file = fopen(path, "wb");
  if (!file) return "cannot write the tensor file";
  uint64_t size = length;
  fwrite(&size, 8, 1, file);
  fwrite(header, 1, length, file);
  for (int n = 0; n < all->count; n++)
    for (long e = 0; e < all->t[n].count; e++) {
      Tensor *t = &all->t[n];
      uint16_t half = t->dtype == F16 ? to_half(t->x[e]) : t->dtype == BF16 ? to_bfloat(t->x[e]) : 0;
      const void *from = t->dtype == I32 ? (void *)&t->i[e] : t->dtype == F32 ? (void *)&t->x[e] : (void *)&half;
      fwrite(from, (size_t)WIDTHS[t->dtype], 1, file);
    }
  return fclose(file) ? "cannot write the tensor file" : NULL;
}

/* ------------------------------------------------------------------------------------------------ operations */

typedef enum { SOFTMAX, RELU, IDENTITY } Map;
#define NONE INT32_MAX /* window None */

typedef struct { long window; Map map; float scale, eps; int has_scale; } Attributes;

static void softmax(const float *x, float sign, int D, float *out) {
  float top = -INFINITY, sum = 0;
  for (int d = 0; d < D; d++) if (!(sign * x[d] <= top)) top = sign * x[d]; /* NaN becomes the top, and stays */
  for (int d = 0; d < D; d++) sum += out[d] = expf(sign * x[d] - top);
  for (int d = 0; d < D; d++) out[d] /= sum;
}

/* phi(x * scale), FM-1 to FM-3; scale may be NULL. Returns F. */
static int feature_map(Map map, const float *x, const float *scale, int D, float *out) {
  float *y = need(sizeof(float) * (size_t)D);
  for (int d = 0; d < D; d++) y[d] = scale ? x[d] * scale[d] : x[d];
  if (map == SOFTMAX) softmax(y, 1, D, out), softmax(y, -1, D, out + D);
  for (int d = 0; d < D && map == RELU; d++) out[d] = y[d] <= 0 ? 0 : y[d], out[D + d] = y[d] >= 0 ? 0 : -y[d];
  if (map == IDENTITY) memcpy(out, y, sizeof(float) * (size_t)D);
  free(y);
  return map == IDENTITY ? D : 2 * D;
}

static void rotate(const Tensor *cos, const Tensor *sin, long row, int D, const float *x, float *out) { /* ROPE-3 */
  int half = D / 2;
  for (int j = 0; j < half; j++) {
    float c = cos->x[row * half + j], s = sin->x[row * half + j];
    out[j] = x[j] * c - x[half + j] * s;
    out[half + j] = x[half + j] * c + x[j] * s;
  }
}

static float dot(const float *a, const float *b, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* x / sqrt(mean(x^2) + eps): the factor (MIX-2). */
static float rms(const float *x, int n, float eps) {
  float mean = dot(x, x, n) / (float)n;
#if FAULT == 5 /* eps outside the root */
  return 1 / (sqrtf(mean) + eps);
#else
  return 1 / sqrtf(mean + eps);
#endif
}

static void fold(float *state, const float *phi, const float *v, int F, int Dv) { /* RLA-6 */
  for (int f = 0; f < F; f++)
    for (int e = 0; e < Dv; e++) {
      float *s = &state[f * Dv + e];
      *s += phi[f] * v[e];
#if FAULT == 3 /* the state is kept in bfloat16 */
      *s = from_bits((uint32_t)to_bfloat(*s) << 16);
#endif
    }
}

/* One row of the batch as seen by one key/value head: tokens are the cached ones and then the new ones. */
typedef struct {
  int *document; /* [N], -1 where inert */
  long *index;   /* [N], position in the document */
  long *row;     /* [N], row of the rotary table */
  long N, W;
} Row;

/* Documents, indices and rotary rows of batch row b (SEG-1 to SEG-3, EXT-8, ROPE-4). */
static void describe_row(Tensors *in, long b, long W, long T, Row *r) {
  Tensor *ids = find(in, "segment_ids"), *positions = find(in, "positions");
  Tensor *seen = find(in, "cache_length"), *lengths = find(in, "lengths");
  int document = -1;
  r->N = W + T, r->W = W;
  for (long c = 0; c < W + T; c++) {
    long t = c - W;
    if (seen) {
      r->index[c] = seen->i[b] - W + c;
      r->document[c] = r->index[c] < 0 || t >= (lengths ? lengths->i[b] : T) ? -1 : 0;
    } else {
      int32_t id = ids ? ids->i[b * T + t] : 1, before = t == 0 ? 0 : ids ? ids->i[b * T + t - 1] : 1;
      if (id && id != before) document++;
      r->document[c] = id ? document : -1;
      r->index[c] = !id || id != before ? 0 : r->index[c - 1] + 1;
    }
    r->row[c] = positions ? positions->i[b * T + t] : r->index[c];
  }
}

/* Both branches, or one: rattention, rattention_extend, sliding_window_attention, residual_linear_attention. */
static void attention(Tensors *in, Tensors *out, const Attributes *a, int near, int far, int extend) {
  Tensor *q = find(in, "q"), *k = find(in, "k"), *v = find(in, "v");
  Tensor *cos = find(in, "rope_cos"), *sin = find(in, "rope_sin"), *memory = find(in, "memory");
  Tensor *q_scale = find(in, "q_scale"), *k_scale = find(in, "k_scale");
  Tensor *cache_k = find(in, "cache_k"), *cache_v = find(in, "cache_v");
  Tensor *carried = find(in, extend ? "cache_state" : "initial_state");
  long B = q->shape[0], T = q->shape[1], W = extend ? cache_k->shape[1] : 0, N = W + T, w = a->window;
  int Hq = (int)q->shape[2], D = (int)q->shape[3], Hkv = (int)k->shape[2], Dv = (int)v->shape[3], G = Hq / Hkv;
  int F = a->map == IDENTITY ? D : 2 * D;
  float scale = a->has_scale ? a->scale : 1 / sqrtf((float)D);
  long slots = extend && w == NONE ? W + T : W;
  Tensor *result = add(out, "out", q->dtype, 4, (long[]){B, T, Hq, Dv}), *state = NULL, *next_k = NULL, *next_v = NULL;
  if (far) state = add(out, extend ? "cache_state" : "final_state", F32, 4, (long[]){B, Hkv, F, Dv});
  if (extend) {
    next_k = add(out, "cache_k", k->dtype, 4, (long[]){B, slots, Hkv, D});
    next_v = add(out, "cache_v", v->dtype, 4, (long[]){B, slots, Hkv, Dv});
    Tensor *length = add(out, "cache_length", I32, 1, (long[]){B});
    Tensor *seen = find(in, "cache_length"), *lengths = find(in, "lengths");
    for (long b = 0; b < B; b++) length->i[b] = seen->i[b] + (lengths ? lengths->i[b] : (int32_t)T);
  }
  size_t n = (size_t)N;
  Row r = {need(sizeof(int) * n), need(sizeof(long) * n), need(sizeof(long) * n), 0, 0};
  float *plain = need(sizeof(float) * n * (size_t)D), *turned = need(sizeof(float) * n * (size_t)D);
  float *values = need(sizeof(float) * n * (size_t)Dv), *phi = need(sizeof(float) * n * 2 * (size_t)D);
  float *p = need(sizeof(float) * n), *S = need(sizeof(float) * (size_t)F * (size_t)Dv);
  float *rq = need(sizeof(float) * (size_t)D), *fq = need(sizeof(float) * 2 * (size_t)D);
  float *swa = need(sizeof(float) * (size_t)Dv), *rla = need(sizeof(float) * (size_t)Dv);

  for (long b = 0; b < B; b++) for (int h = 0; h < Hkv; h++) {
    describe_row(in, b, W, T, &r);
    for (long c = 0; c < N; c++) {
      if (r.document[c] < 0) continue; /* inert: stays zero whatever it holds (SEG-5, EXT-7, EXT-9) */
      long from = c < W ? (b * W + c) * Hkv + h : (b * T + c - W) * Hkv + h;
      memcpy(plain + c * D, (c < W ? cache_k : k)->x + from * D, sizeof(float) * (size_t)D);
      memcpy(values + c * Dv, (c < W ? cache_v : v)->x + from * Dv, sizeof(float) * (size_t)Dv);
      memcpy(turned + c * D, plain + c * D, sizeof(float) * (size_t)D);
      /* With no live query no row of the table is read, and the table may be empty. */
      if (cos && r.row[c] < cos->shape[0]) rotate(cos, sin, r.row[c], D, plain + c * D, turned + c * D);
      if (far) feature_map(a->map, plain + c * D, k_scale ? k_scale->x : NULL, D, phi + c * F);
    }
    if (far) memset(S, 0, sizeof(float) * (size_t)(F * Dv));
    if (carried) memcpy(S, carried->x + (b * Hkv + h) * F * Dv, sizeof(float) * (size_t)(F * Dv)); /* RLA-4, SEG-6 */
    int document = 0;
    long folded = 0, last = -1; /* first key not yet in S; last live key */
    while (folded < N && r.document[folded] < 0) folded++;
    for (long c = 0; c < N; c++) {
      if (r.document[c] < 0) continue;
      if (r.document[c] != document) { /* SEG-1, SEG-2 */
        document = r.document[c], folded = c;
        if (far) memset(S, 0, sizeof(float) * (size_t)(F * Dv));
      }
      last = c;
      if (c < W) continue;
      for (; far && w != NONE && folded <= c - w - 1; folded++) /* RLA-1 */
        fold(S, phi + folded * F, values + folded * Dv, F, Dv);
      long first = c - r.index[c] > 0 ? c - r.index[c] : 0; /* of the document, or of the cache */
      while (r.document[first] != document) first++;        /* unused slots */
      long begin = w == NONE || c - w < first ? first : c - w; /* SWA-1 */
#if FAULT == 1 /* w tokens, the token itself included */
      if (w != NONE && w > 0 && c - w >= first) begin = c - w + 1;
#endif
      for (int g = 0; g < G; g++) {
#if FAULT == 2 /* heads tiled instead of repeated */
        int head = g * Hkv + h;
#else
        int head = h * G + g; /* SWA-4, RLA-8 */
#endif
        const float *query = q->x + ((b * T + c - W) * Hq + head) * D;
        float *to = result->x + ((b * T + c - W) * Hq + head) * Dv;
        memset(swa, 0, sizeof(float) * (size_t)Dv), memset(rla, 0, sizeof(float) * (size_t)Dv);
        if (near && begin <= c) {
          float top = -INFINITY, sum = 0;
          memcpy(rq, query, sizeof(float) * (size_t)D);
          if (cos) rotate(cos, sin, r.row[c], D, query, rq);
          for (long i = begin; i <= c; i++) { /* SWA-2 */
            p[i] = scale * dot(rq, turned + i * D, D);
            if (!(p[i] <= top)) top = p[i];
          }
          for (long i = begin; i <= c; i++) sum += p[i] = expf(p[i] - top); /* SWA-3 */
          for (long i = begin; i <= c; i++) for (int e = 0; e < Dv; e++) swa[e] += p[i] / sum * values[i * Dv + e];
        }
        if (far) {
          feature_map(a->map, query, q_scale ? q_scale->x : NULL, D, fq);
          for (int f = 0; f < F; f++) for (int e = 0; e < Dv; e++) {
            float m = memory ? memory->x[((long)head * F + f) * Dv + e] : 0; /* RLA-5 */
            rla[e] += fq[f] * (S[f * Dv + e] + m);
          }
        }
        if (near && far) { /* MIX-1 */
          float rs = rms(swa, Dv, a->eps), rr = rms(rla, Dv, a->eps);
          const float *ws = find(in, "swa_weight")->x + head * Dv, *wr = find(in, "rla_weight")->x + head * Dv;
          for (int e = 0; e < Dv; e++) to[e] = ws[e] * (swa[e] * rs) + wr[e] * (rla[e] * rr);
        } else memcpy(to, near ? swa : rla, sizeof(float) * (size_t)Dv);
      }
    }
    long keep = w == NONE ? N : w < 0 ? 0 : w; /* tokens that stay out of the state (RLA-6, RLA-9, EXT-5) */
    for (; far && w != NONE && last >= 0 && folded <= last - keep; folded++)
      fold(S, phi + folded * F, values + folded * Dv, F, Dv);
    if (far) memcpy(state->x + (b * Hkv + h) * F * Dv, S, sizeof(float) * (size_t)(F * Dv));
    if (extend) { /* EXT-4: the newest last, zeros on the left */
      Tensor *lengths = find(in, "lengths");
      long live = W + (lengths ? lengths->i[b] : T); /* keys up to the last real token */
      for (long s = 0; s < slots; s++) {
        long c = live - slots + s;
        if (c < 0 || r.document[c] < 0) continue;
#if FAULT == 4 /* the cache holds rotated keys */
        memcpy(next_k->x + ((b * slots + s) * Hkv + h) * D, turned + c * D, sizeof(float) * (size_t)D);
#else
        memcpy(next_k->x + ((b * slots + s) * Hkv + h) * D, plain + c * D, sizeof(float) * (size_t)D); /* EXT-3 */
#endif
        memcpy(next_v->x + ((b * slots + s) * Hkv + h) * Dv, values + c * Dv, sizeof(float) * (size_t)Dv);
      }
    }
  }
  free(r.document), free(r.index), free(r.row), free(plain), free(turned), free(values), free(phi), free(p), free(S);
  free(rq), free(fq), free(swa), free(rla);
}

static void feature_map_op(Tensors *in, Tensors *out, const Attributes *a) {
  Tensor *x = find(in, "x");
  int D = (int)x->shape[3], F = a->map == IDENTITY ? D : 2 * D;
  Tensor *y = add(out, "out", x->dtype, 4, (long[]){x->shape[0], x->shape[1], x->shape[2], F});
  for (long i = 0; i < x->count / D; i++) feature_map(a->map, x->x + i * D, NULL, D, y->x + i * F);
}

static void rms_mix_op(Tensors *in, Tensors *out, const Attributes *a) {
  Tensor *swa = find(in, "swa"), *rla = find(in, "rla"), *ws = find(in, "swa_weight"), *wr = find(in, "rla_weight");
  Tensor *y = add(out, "out", swa->dtype, 4, swa->shape);
  int H = (int)swa->shape[2], Dv = (int)swa->shape[3];
  for (long i = 0; i < swa->count / Dv; i++) {
    const float *s = swa->x + i * Dv, *r = rla->x + i * Dv;
    float rs = rms(s, Dv, a->eps), rr = rms(r, Dv, a->eps);
    for (int e = 0; e < Dv; e++)
      y->x[i * Dv + e] = ws->x[i % H * Dv + e] * (s[e] * rs) + wr->x[i % H * Dv + e] * (r[e] * rr);
  }
}

/* ------------------------------------------------------------------------------------------------ protocol */

static const char *const DESCRIBE =
    "{\"reply\":\"describe\",\"protocol\":1,\"describe\":{"
    "\"name\":\"c-scalar\",\"version\":\"1\",\"spec_version\":\"1.0.0-draft.1\","
    "\"operations\":[\"feature_map\",\"sliding_window_attention\",\"residual_linear_attention\",\"rms_mix\","
    "\"rattention\",\"rattention_extend\"],"
    "\"dtypes\":[\"float32\",\"bfloat16\",\"float16\"],"
    "\"capabilities\":[\"rope\",\"positions\",\"segments\",\"scales\",\"memory\",\"initial_state\",\"cache\","
    "\"lengths\"],"
    "\"tile_sizes\":{\"T\":[],\"window\":[],\"D\":[]},\"limits\":{}}}";

static void print_string(const char *text) {
  putchar('"');
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') putchar('\\'), putchar(*text);
    else if ((unsigned char)*text < 32) printf("\\u%04x", *text);
    else putchar(*text);
  }
  putchar('"');
}

static Attributes attributes_of(Json *j) {
  Attributes a = {0, SOFTMAX, 0, 1e-6f, 0};
  Json *window = member(j, "window"), *scale = member(j, "scale"), *eps = member(j, "eps");
  const char *map = string_of(j, "feature_map");
  a.window = window && window->kind == NUMBER ? (long)window->number : NONE;
  if (scale && scale->kind == NUMBER) a.scale = (float)scale->number, a.has_scale = 1;
  if (eps) a.eps = (float)eps->number;
  a.map = !strcmp(map, "relu") ? RELU : !strcmp(map, "identity") ? IDENTITY : SOFTMAX;
  return a;
}

/* One call: NULL, or a reason why the reply is `unsupported`. */
static const char *run(Json *request, Tensors *in, Tensors *out) {
  const char *op = string_of(request, "op");
  Attributes a = attributes_of(member(request, "attrs"));
  if (!strcmp(op, "feature_map")) feature_map_op(in, out, &a);
  else if (!strcmp(op, "rms_mix")) rms_mix_op(in, out, &a);
  else if (!strcmp(op, "sliding_window_attention")) attention(in, out, &a, 1, 0, 0);
  else if (!strcmp(op, "residual_linear_attention")) attention(in, out, &a, 0, 1, 0);
  else if (!strcmp(op, "rattention")) attention(in, out, &a, 1, 1, 0);
  else if (!strcmp(op, "rattention_extend")) attention(in, out, &a, 1, 1, 1);
  else return "the operation is not part of this port";
  return NULL;
}

static char *read_line(void) {
  size_t size = 4096, length = 0;
  char *line = need(size);
  while (fgets(line + length, (int)(size - length), stdin)) {
    length += strlen(line + length);
    if (length && line[length - 1] == '\n') return line;
    if (!(line = realloc(line, size *= 2))) exit(1);
  }
  free(line);
  return NULL;
}

int main(void) {
  char *line;
  while ((line = read_line())) {
    Json *request = read_json(line);
    const char *command = string_of(request, "cmd");
    if (!strcmp(command, "stop")) return 0;
    if (!strcmp(command, "start")) puts(DESCRIBE);
    else if (!strcmp(command, "run")) {
      static Tensors in, out;
      long id = member(request, "id") ? (long)member(request, "id")->number : 0;
      const char *fault = load(string_of(request, "tensors"), &in), *reason = NULL;
      if (!fault && !(reason = run(request, &in, &out))) fault = save(string_of(request, "outputs"), &out);
      if (fault || reason) {
        const char *reply = fault ? "error" : "unsupported", *field = fault ? "message" : "reason";
        printf("{\"reply\":\"%s\",\"id\":%ld,\"%s\":", reply, id, field);
        print_string(fault ? fault : reason);
        puts("}");
      } else printf("{\"reply\":\"result\",\"id\":%ld,\"metadata\":{\"path\":\"scalar\",\"kernels\":[]}}\n", id);
      release(&in), release(&out);
    } else {
      printf("{\"reply\":\"error\",\"message\":\"unknown command\"}\n");
    }
    fflush(stdout);
    discard(request);
    free(line);
  }
  return 0;
}
