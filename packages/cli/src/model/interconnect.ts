/**
 * Owns the paper's minimum interconnect bandwidth for a model, as section 3.1 of arXiv 2405.01814 gives it:
 *
 *     (2 + 2/G) e d B L / (alpha (MTIME(B) + ATIME(B, l)))
 *
 * Above the line, the bytes of one decode step of a batch: per token and layer q goes to the shards and the attention
 * comes back (2 d elements), k and v go with q (2 d / G). Below, the time that they may take: a share alpha of what the
 * dense stages and the attention compute.
 *
 * Invariants
 * 1. G, d, L are the model's; B and l are given; e is 2 as in the paper, for q, k, v and the attention travel like the f16 KV that
 *    is the default (f32 KV needs twice as much); alpha is the 0.2 of the paper's figure 4, and MTIME and ATIME are assumed, until they are given. Every figure says which of these it is.
 * 2. d is the width of q (heads x head_dim). In the paper's models that is the hidden size, in Qwen3 and Gemma it is not.
 */
import type { AttentionSpec } from '@lamina/tensor';

export const WIRE_BYTES = 2;

/** Round figures for one x86 core with AVX2: the KV bandwidth was measured once, the other two are estimates; yours differ. */
const ASSUMED = {
  /** Dense stages with a large batch. */
  denseFlopsPerSecond: 100e9,
  /** Dense stages with a small batch, which read every weight once per step. */
  denseBytesPerSecond: 10e9,
  /** Attention over f16 KV. */
  attentionBytesPerSecond: 8.5e9,
} as const;

/** model: follows from the model. given: an option or its default. paper: its value. assumed: an estimate. */
export type Origin = 'model' | 'given' | 'paper' | 'assumed';

export interface Term {
  readonly value: number;
  readonly origin: Origin;
}

export interface InterconnectInput {
  readonly attention: AttentionSpec;
  readonly batch: number;
  /** Tokens of each request. */
  readonly context: number;
  /** Of all stages. */
  readonly parameters: number;
  readonly weightBytes: number;
  readonly alpha: Term;
  readonly mtimeMs?: number | undefined;
  readonly atimeMs?: number | undefined;
}

export interface Interconnect {
  readonly groupSize: Term;
  readonly elementBytes: Term;
  readonly queryWidth: Term;
  readonly numLayers: Term;
  readonly batch: Term;
  readonly context: Term;
  readonly alpha: Term;
  readonly mtimeMs: Term;
  readonly atimeMs: Term;
  readonly bytesPerStep: number;
  readonly minBytesPerSecond: number;
}

export function interconnectOf(input: InterconnectInput): Interconnect {
  const { attention, batch, context, alpha } = input;
  const groupSize = attention.numHeads / attention.numKvHeads;
  const queryWidth = attention.numHeads * attention.headDim;
  const bytesPerStep = (2 + 2 / groupSize) * WIRE_BYTES * queryWidth * batch * attention.numLayers;
  const mtimeMs = term(input.mtimeMs, () => denseMs(input));
  const atimeMs = term(input.atimeMs, () => attentionMs(attention, batch, context));
  return {
    groupSize: { value: groupSize, origin: 'model' },
    elementBytes: { value: WIRE_BYTES, origin: 'model' },
    queryWidth: { value: queryWidth, origin: 'model' },
    numLayers: { value: attention.numLayers, origin: 'model' },
    batch: { value: batch, origin: 'given' },
    context: { value: context, origin: 'given' },
    alpha,
    mtimeMs,
    atimeMs,
    bytesPerStep,
    minBytesPerSecond: (bytesPerStep * 1000) / (alpha.value * (mtimeMs.value + atimeMs.value)),
  };
}

function term(given: number | undefined, estimate: () => number): Term {
  return given === undefined ? { value: estimate(), origin: 'assumed' } : { value: given, origin: 'given' };
}

/** The roofline of the dense stages: bound by reading the weights, or by computing with them. */
function denseMs({ batch, parameters, weightBytes }: InterconnectInput): number {
  const readSeconds = weightBytes / ASSUMED.denseBytesPerSecond;
  const computeSeconds = (2 * parameters * batch) / ASSUMED.denseFlopsPerSecond;
  return Math.max(readSeconds, computeSeconds) * 1000;
}

/** One shard that reads the f16 KV of every request once, as far as each layer's window reaches. */
function attentionMs(spec: AttentionSpec, batch: number, context: number): number {
  const windows = spec.windowTokens ?? Array.from({ length: spec.numLayers }, () => 0);
  const tokens = windows.reduce((sum, window) => sum + (window === 0 ? context : Math.min(window, context)), 0);
  const kvBytes = batch * tokens * 2 * spec.numKvHeads * spec.headDim * 2;
  return (kvBytes / ASSUMED.attentionBytesPerSecond) * 1000;
}
