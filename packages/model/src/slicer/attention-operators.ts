/**
 * Owns finding and replacing the fused attention operators that have the cache as inputs: com.microsoft
 * GroupQueryAttention, MultiHeadAttention and Attention, ai.onnx Attention.
 *
 * Invariants
 * 1. Operators are found by what they are, never by a name; an attribute or input that changes the arithmetic and that
 *    is not implemented is refused, never ignored.
 */
import { reasonOf } from '../model-error.ts';
import { type BiasAt, biasOf, type MaskFacts, readMask } from './attention-mask.ts';
import { type AttentionSite, type Laid, SiteBuilder, type SiteFacts } from './attention-site.ts';
import {
  type DecoderGraph,
  floatAttribute,
  type GraphNode,
  integerAttribute,
  integersAttribute,
  SUPPORTED_FORMS,
  stringAttribute,
} from './decoder-graph.ts';
import { TYPE } from './element-types.ts';
import type { Evaluation } from './evaluate.ts';
import { POSITIONS, type Sample } from './samples.ts';

/** One evaluated run. */
export interface Run {
  readonly sample: Sample;
  readonly evaluation: Evaluation;
}

export interface SearchContext {
  readonly graph: DecoderGraph;
  /** A short run, to read shapes from. */
  readonly run: Run;
  /** A run with more cache than any sliding window, to read masks from. */
  readonly longRun: Run;
}

const MICROSOFT = 'com.microsoft';

/** Replaces every fused operator with a cache of its own by a site. */
export function replaceOperators(context: SearchContext): AttentionSite[] {
  return [...context.graph.nodes].flatMap((node) => {
    const kind = node.domain === '' ? node.opType : `${node.domain}.${node.opType}`;
    if (kind === `${MICROSOFT}.GroupQueryAttention`) return [replaceGroupQuery(context, node)];
    if (kind === `${MICROSOFT}.MultiHeadAttention` && has(node, 6)) return [replaceMultiHead(context, node)];
    if (kind === `${MICROSOFT}.Attention`) return [replacePacked(context, node)];
    if (kind === 'Attention' && has(node, 4)) return [replaceStandard(context, node)];
    return [];
  });
}

const has = (node: GraphNode, i: number): boolean => (node.inputs[i] ?? '') !== '';

/** A value and how it lies in the short run. */
export function laid({ run }: SearchContext, name: string): Laid {
  const { dataType, dims } = run.evaluation.value(name);
  return { name, dataType, dims };
}

/** What the mask inputs of an operator mean; `isCausal` if the operator hides later keys by itself. */
export function readMaskInput(
  { graph, run, longRun }: SearchContext,
  node: GraphNode,
  name: string,
  numHeads: number,
  isCausal: boolean,
): MaskFacts {
  if (name === '' && !isCausal) throw graph.refuse(node, 'its attention is not causal', SUPPORTED_FORMS);
  const facts = [run, longRun].map(({ sample, evaluation }) => {
    let biasAt: BiasAt = () => 0;
    if (name !== '') {
      const { dataType, dims, numbers } = evaluation.value(name);
      const known = numbers();
      if (known === null) throw graph.refuse(node, `its mask '${name}' cannot be evaluated`, SUPPORTED_FORMS);
      biasAt = biasOf(known, dims, dataType === TYPE.bool);
    }
    try {
      return readMask(biasAt, numHeads, sample, isCausal);
    } catch (error) {
      throw graph.refuse(node, reasonOf(error), SUPPORTED_FORMS);
    }
  });
  const [, long] = facts;
  if (long === undefined) throw new TypeError('no runs');
  return long;
}

/** What all of these operators say in one way. */
export function factsOf(
  node: GraphNode,
  heads: Pick<SiteFacts, 'numHeads' | 'numKvHeads' | 'headDim'>,
  mask: MaskFacts,
): SiteFacts {
  return {
    ...heads,
    scale: floatAttribute(node, 'scale', 0) || 1 / Math.sqrt(heads.headDim),
    softcap: floatAttribute(node, 'softcap', 0),
    ...mask,
    sinkLogits: undefined,
  };
}

/** What com.microsoft MultiHeadAttention and Attention say in one way: Q, K and V of one width, masked by input 5. */
function multiHeadFacts(context: SearchContext, node: GraphNode, numHeads: number, width: number): SiteFacts {
  const isCausal = integerAttribute(node, 'unidirectional', 0) === 1;
  const mask = readMaskInput(context, node, node.inputs[5] ?? '', numHeads, isCausal);
  return factsOf(node, { numHeads, numKvHeads: numHeads, headDim: width / numHeads }, mask);
}

/** Replaces `node` by a site over the rows of Q, K and V, and returns the site. */
export function replaceBySite(
  context: SearchContext,
  node: GraphNode,
  builder: SiteBuilder,
  rows: { query: string; key: string; value: string },
  facts: SiteFacts,
): AttentionSite {
  const site = builder.site(rows.query, rows.key, rows.value);
  builder.deliver(site, laid(context, node.outputs[0] ?? ''), context.run.sample.tokens, facts);
  context.graph.replace(node, builder.nodes);
  return { node: site, origin: node, facts };
}

/** Q, K and V that lie next to each other in [1, T, width]. */
function splitRows(
  builder: SiteBuilder,
  packed: string,
  widths: readonly number[],
): { query: string; key: string; value: string } {
  const [q = 0, k = 0, v = 0] = widths;
  return {
    query: builder.columns(packed, 0, q),
    key: builder.columns(packed, q, q + k),
    value: builder.columns(packed, q + k, q + k + v),
  };
}

function replaceGroupQuery(context: SearchContext, node: GraphNode): AttentionSite {
  const { graph } = context;
  const numHeads = integerAttribute(node, 'num_heads', 0);
  const numKvHeads = integerAttribute(node, 'kv_num_heads', 0);
  for (const part of ['k', 'v']) {
    const kind = stringAttribute(node, `${part}_quant_type`);
    if (kind !== '' && kind !== 'NONE')
      throw graph.refuse(node, `${part}_quant_type ${kind} (a quantized cache) is not supported`, SUPPORTED_FORMS);
  }
  for (const [i, name] of node.inputs.entries()) {
    if (i > 11 && name !== '') throw graph.refuse(node, `input ${i} is not supported`, SUPPORTED_FORMS);
  }
  const builder = new SiteBuilder(graph, node);
  const { tokens } = context.run.sample;
  const query = laid(context, node.inputs[0] ?? '');
  const isPacked = !has(node, 1);
  const headDim = (query.dims[2] ?? 0) / (numHeads + (isPacked ? 2 * numKvHeads : 0));
  const widths = [numHeads * headDim, numKvHeads * headDim, numKvHeads * headDim];
  const joined = builder.rows(query, tokens);
  const rows = isPacked
    ? splitRows(builder, joined, widths)
    : {
        query: joined,
        key: builder.rows(laid(context, node.inputs[1] ?? ''), tokens),
        value: builder.rows(laid(context, node.inputs[2] ?? ''), tokens),
      };
  if (integerAttribute(node, 'do_rotary', 0) === 1) {
    const tables = [7, 8].map((i) => laid(context, node.inputs[i] ?? ''));
    const halfDim = tables[0]?.dims[1] ?? 0;
    const names = tables.map((table) => builder.cast(table.name, table.dataType, TYPE.float));
    const rotate = (value: string, heads: number): string =>
      builder.add(
        'RotaryEmbedding',
        [value, has(node, 9) ? (node.inputs[9] ?? '') : POSITIONS, ...names],
        {
          interleaved: integerAttribute(node, 'rotary_interleaved', 0),
          num_heads: heads,
          ...(halfDim * 2 === headDim ? {} : { rotary_embedding_dim: halfDim * 2 }),
        },
        MICROSOFT,
      );
    rows.query = rotate(rows.query, numHeads);
    rows.key = rotate(rows.key, numKvHeads);
  }
  const mask = readMaskInput(context, node, node.inputs[10] ?? '', numHeads, true);
  const window = integerAttribute(node, 'local_window_size', -1);
  const facts: SiteFacts = {
    ...factsOf(node, { numHeads, numKvHeads, headDim }, mask),
    windowTokens: window > 0 ? window : mask.windowTokens,
    sinkLogits: sinksOf(context, node, numHeads),
  };
  return replaceBySite(context, node, builder, rows, facts);
}

function sinksOf({ graph, run }: SearchContext, node: GraphNode, numHeads: number): readonly number[] | undefined {
  if (has(node, 11)) {
    const sinks = run.evaluation.value(node.inputs[11] ?? '').numbers();
    if (sinks?.length !== numHeads) throw graph.refuse(node, 'its head_sink is no constant per head', SUPPORTED_FORMS);
    return Array.from(sinks);
  }
  return integerAttribute(node, 'smooth_softmax', 0) === 1 ? Array.from({ length: numHeads }, () => 0) : undefined;
}

function replaceMultiHead(context: SearchContext, node: GraphNode): AttentionSite {
  const { graph } = context;
  const builder = new SiteBuilder(graph, node);
  const { tokens } = context.run.sample;
  const numHeads = integerAttribute(node, 'num_heads', 0);
  const parts = [0, 1, 2].map((i) => laid(context, node.inputs[i] ?? ''));
  const width = parts[0]?.dims[2] ?? 0;
  if (parts.some(({ dims }) => dims.length !== 3 || dims[2] !== width)) {
    throw graph.refuse(node, 'only Q, K and V of one shape [batch, tokens, width] are supported', SUPPORTED_FORMS);
  }
  const [query = '', key = '', value = ''] = parts.map((part, i) => {
    const rows = builder.rows(part, tokens);
    if (!has(node, 3)) return rows;
    const bias = laid(context, node.inputs[3] ?? '');
    const ends = [i * width, (i + 1) * width].map((end) => builder.integers([end]));
    const own = builder.add('Slice', [bias.name, ends[0] ?? '', ends[1] ?? '', builder.integers([0])]);
    return builder.add('Add', [rows, builder.cast(own, bias.dataType, TYPE.float)]);
  });
  const facts = multiHeadFacts(context, node, numHeads, width);
  return replaceBySite(context, node, builder, { query, key, value }, facts);
}

function replacePacked(context: SearchContext, node: GraphNode): AttentionSite {
  const { graph } = context;
  if (!has(node, 4)) throw graph.refuse(node, 'has no past: this is no decoder with a KV cache', SUPPORTED_FORMS);
  if (integerAttribute(node, 'do_rotary', 0) === 1)
    throw graph.refuse(node, 'do_rotary is not supported here', SUPPORTED_FORMS);
  const builder = new SiteBuilder(graph, node);
  const numHeads = integerAttribute(node, 'num_heads', 0);
  const [input, weight] = [0, 1].map((i) => laid(context, node.inputs[i] ?? ''));
  const third = (weight?.dims[1] ?? 0) / 3;
  const widths = integersAttribute(node, 'qkv_hidden_sizes') ?? [third, third, third];
  const [width = 0] = widths;
  if (widths.some((other) => other !== width))
    throw graph.refuse(node, `qkv_hidden_sizes ${widths} is not supported`, SUPPORTED_FORMS);
  let packed = builder.add('MatMul', [input?.name ?? '', weight?.name ?? '']);
  if (has(node, 2)) packed = builder.add('Add', [packed, node.inputs[2] ?? '']);
  const rows = splitRows(builder, builder.cast(packed, input?.dataType ?? 0, TYPE.float), widths);
  const facts = multiHeadFacts(context, node, numHeads, width);
  return replaceBySite(context, node, builder, rows, facts);
}

function replaceStandard(context: SearchContext, node: GraphNode): AttentionSite {
  const { graph } = context;
  if (has(node, 6)) throw graph.refuse(node, 'nonpad_kv_seqlen is not supported', SUPPORTED_FORMS);
  const builder = new SiteBuilder(graph, node);
  const { tokens } = context.run.sample;
  const [query, key, value] = [0, 1, 2].map((i) => laid(context, node.inputs[i] ?? ''));
  const [past, pastValue] = [4, 5].map((i) => laid(context, node.inputs[i] ?? ''));
  if (!query || !key || !value || past?.dims.length !== 4 || past.dims[3] !== pastValue?.dims[3]) {
    throw graph.refuse(
      node,
      'heads of V that are wider or narrower than those of K are not supported',
      SUPPORTED_FORMS,
    );
  }
  const [, numKvHeads = 0, , headDim = 0] = past.dims;
  const numHeads = query.dims.length === 4 ? (query.dims[1] ?? 0) : integerAttribute(node, 'q_num_heads', 0);
  const isCausal = integerAttribute(node, 'is_causal', 0) === 1;
  const mask = readMaskInput(context, node, node.inputs[3] ?? '', numHeads, isCausal);
  const facts = factsOf(node, { numHeads, numKvHeads, headDim }, mask);
  const rows = {
    query: builder.rows(query, tokens),
    key: builder.rows(key, tokens),
    value: builder.rows(value, tokens),
  };
  return replaceBySite(context, node, builder, rows, facts);
}
