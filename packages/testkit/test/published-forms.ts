/**
 * Owns the published decoders that tests run: every form of attention and every precision, with the bounds that hold.
 */
import type { ExportForm, ExportOptions } from '@lamina/testkit';

export interface PublishedForm {
  readonly name: string;
  readonly form: ExportForm;
  readonly options: Partial<ExportOptions>;
  /** Largest difference of a logit between the uncut and the staged graph; logits are of order 5, of GPT-2 and tied 20. */
  readonly bound: number;
  /** Largest difference of a logit between a request alone and in a wave of several. */
  readonly waveBound: number;
  /** transformers.js feeds a decoder of this form. */
  readonly runsInTransformersJs: boolean;
}

const SINGLE = 1e-4;
/** Float16: the shards attend in float32, the operator of the uncut graph rounds what it is given and what it gives. */
const HALF = 3e-2;
/** Dynamic quantization rounds with one scale for all activations of a step; a value next to a boundary may go either way. */
const INTEGER = 0.5;

function single(name: string, form: ExportForm, options: Partial<ExportOptions> = {}): PublishedForm {
  return { name, form, options, bound: SINGLE, waveBound: SINGLE, runsInTransformersJs: true };
}

const half = (published: PublishedForm): PublishedForm => ({ ...published, bound: HALF, waveBound: HALF });
const integer = (published: PublishedForm): PublishedForm => ({ ...published, bound: INTEGER, waveBound: INTEGER });

const equalHeads = { numKvHeads: 4 };
const eager = { operator: 'eager', scaling: 'mul', mask: 'add' } as const;

export const PUBLISHED_FORMS: readonly PublishedForm[] = [
  single('GroupQueryAttention, rotary inside', { operator: 'gqa' }),
  single('GroupQueryAttention, external data', { operator: 'gqa' }, { externalData: true, tied: true }),
  single('GroupQueryAttention, packed', { operator: 'gqa', packed: true }),
  single('GroupQueryAttention, rotary interleaved', { operator: 'gqa', rotary: 'interleaved' }),
  single('GroupQueryAttention, rotary of half the head', { operator: 'gqa', rotary: 'partial' }, { headDim: 32 }),
  single('GroupQueryAttention, rotary before', { operator: 'gqa', rotary: 'before' }),
  single('GroupQueryAttention, window', { operator: 'gqa', localWindow: 6 }),
  single('GroupQueryAttention, soft-cap and scale', { operator: 'gqa', softcap: 5, scale: 0.5 }),
  single('GroupQueryAttention, smooth softmax', { operator: 'gqa', sinks: 'smooth' }),
  single('GroupQueryAttention, head sinks', { operator: 'gqa', sinks: 'head' }),
  single('GroupQueryAttention, parallel blocks', { operator: 'gqa' }, { residual: 'parallel' }),
  single('GroupQueryAttention, embedding in every layer', { operator: 'gqa' }, { residual: 'embedding' }),
  single('MultiHeadAttention', { operator: 'mha' }, equalHeads),
  single('MultiHeadAttention, cache joined before', { operator: 'mha', joined: true }),
  single('MultiHeadAttention, heads of 24', { operator: 'mha' }, { ...equalHeads, headDim: 24 }),
  single('GroupQueryAttention, heads of 40', { operator: 'gqa', rotary: 'before' }, { headDim: 40 }),
  single('written out, heads of 8', eager, { headDim: 8 }),
  single('written out, scores scaled', eager),
  single('written out, sdpa, Boolean mask', { operator: 'eager', scaling: 'sdpa', mask: 'where' }, { tied: true }),
  single('written out, window', { ...eager, window: 6 }),
  single('written out, soft-cap', { ...eager, softcap: 5 }),
  single('written out, ALiBi', { ...eager, alibi: true }),
  { ...single('Attention, packed past', { operator: 'gpt2', fused: true }), runsInTransformersJs: false },
  single('GPT-2 written out', { operator: 'gpt2', fused: false }),
  single('GPT-2 written out, merged', { operator: 'gpt2', fused: false, merged: true }),
  single('ai.onnx Attention, rank 4, float mask', { operator: 'onnx', rank: 4, mask: 'float' }),
  single('ai.onnx Attention, rank 3, Boolean mask', { operator: 'onnx', rank: 3, mask: 'bool' }),
  single('ai.onnx Attention, indexed mask', { operator: 'onnx', rank: 4, mask: 'indexed' }),
  single('ai.onnx Attention, causal', { operator: 'onnx', rank: 4, mask: 'causal' }),
  single('ai.onnx Attention, cache joined before', { operator: 'onnx', rank: 4, mask: 'float', joined: true }),
  single('GroupQueryAttention, q4', { operator: 'gqa' }, { precision: 'q4' }),
  single('GroupQueryAttention, bnb4', { operator: 'gqa' }, { precision: 'bnb4' }),
  single('written out, q4', eager, { precision: 'q4' }),
  half(single('GroupQueryAttention, fp16', { operator: 'gqa' }, { precision: 'fp16' })),
  half(single('GroupQueryAttention, q4f16', { operator: 'gqa' }, { precision: 'q4f16' })),
  half(single('MultiHeadAttention, fp16', { operator: 'mha' }, { ...equalHeads, precision: 'fp16' })),
  half(single('written out, fp16', { operator: 'eager', scaling: 'sdpa', mask: 'add' }, { precision: 'fp16' })),
  integer(single('GroupQueryAttention, int8', { operator: 'gqa' }, { precision: 'int8' })),
  integer(single('GroupQueryAttention, uint8', { operator: 'gqa' }, { precision: 'uint8' })),
  integer(single('written out, int8', eager, { precision: 'int8' })),
];
