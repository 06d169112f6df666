/** Owns how `lamina model inspect` looks to people. */
import type { AttentionSpec } from '@lamina/tensor';
import { bytesText, countText, table } from '../table.ts';
import type { CutEdge, Inspection } from './inspection.ts';
import type { Interconnect, Term } from './interconnect.ts';

const EDGE_NOTES: Readonly<Record<CutEdge['name'], string>> = {
  query: 'sent to every shard that holds KV of the request',
  key: 'sent to the shard of the newest block',
  value: 'sent to the shard of the newest block',
  attention: 'partial outputs, merged by the executor',
  hidden: 'carried to the next stage; never leaves the executor',
};

const ACTIVATION_NOTES: Readonly<Record<Inspection['activations'], string>> = {
  float32: '',
  float16: '; computes in half precision',
  int8: '; products round their activations to 8 bits',
};

export function describeInspection(model: Inspection): string {
  const { attention, contextLength, kvBytesPerToken: kv } = model;
  const facts = [
    [
      'architecture',
      `${model.architecture ?? 'not named'}, ${attention.numLayers} layers, ${model.hiddenSize} values a token between stages`,
    ],
    ...describeForm(model),
    ['context', `${contextLength} tokens`],
    ['vocabulary', `${model.vocabSize} tokens`],
    ['weights', `${countText(model.weights.parameters)} parameters, ${bytesText(model.weights.bytes)}`],
    ...describeAttention(attention),
    ['KV cache', `${bytesText(kv.f16)} per token in f16, ${bytesText(kv.f32)} in f32`],
    ['', `${bytesText(kv.f16 * contextLength)} in f16 for one request of ${contextLength} tokens`],
  ];
  return [
    `${model.modelId}   ${model.dir}`,
    table(facts),
    `${model.numStages} stages, cut at ${attention.numLayers} attention nodes`,
    describeStages(model),
    `cut edges, for one token at one attention node (${bytesText(model.wireBytesPerToken)} per token at all, to the shards and back)`,
    describeEdges(model.cutEdges),
    describeInterconnect(model.interconnect),
  ].join('\n\n');
}

function describeForm({ form, activations }: Inspection): string[][] {
  const note = ACTIVATION_NOTES[activations];
  if (form.kind === 'checkpoint') return [['checkpoint', `stored as ${form.weights}${note}`]];
  const operators = form.attentionOperators.map((name) => (name === 'MatMul' ? 'MatMul - Softmax - MatMul' : name));
  return [
    ['ONNX decoder', `${form.graph} (${form.variant})${note}`],
    ['', `attention found as ${operators.join(', ')}`],
  ];
}

function describeAttention(spec: AttentionSpec): string[][] {
  const { numHeads, numKvHeads, headDim, scale, softcap, windowTokens, sinkLogits, alibiSlopes } = spec;
  const group = numHeads / numKvHeads;
  const sharing = group === 1 ? '' : `, ${group} query heads share one`;
  const rows = [
    [
      'attention',
      `${numHeads} query heads, ${numKvHeads} KV heads of ${headDim}${sharing}; scale ${Number(scale.toPrecision(4))}`,
    ],
  ];
  if (softcap !== undefined) rows.push(['', `scores capped at ${softcap}`]);
  const windows = new Set(windowTokens?.filter((window) => window > 0));
  if (windowTokens !== undefined && windows.size > 0) {
    const layers = windowTokens.filter((window) => window > 0).length;
    rows.push(['', `${layers} of ${windowTokens.length} layers see the last ${[...windows].join(' or ')} tokens only`]);
  }
  if (sinkLogits !== undefined) rows.push(['', 'attention sinks']);
  if (alibiSlopes !== undefined) rows.push(['', 'ALiBi']);
  return rows;
}

/** Neighbours that weigh the same are one row. */
function describeStages({ weights, attention, numStages, vocabSize }: Inspection): string {
  const last = numStages - 1;
  const work = (stage: number): string => {
    if (stage === 0) return 'embedding; layer 0 up to its q, k, v';
    if (stage === last) return `layer ${attention.numLayers - 1} from its attention on; logits`;
    return 'the layer before from its attention on; the next up to its q, k, v';
  };
  const rows: string[][] = [];
  let from = 0;
  for (const { stage, parameters, bytes } of weights.stages) {
    const next = weights.stages[stage + 1];
    if (next !== undefined && next.bytes === bytes && next.parameters === parameters && stage > 0 && stage + 1 < last)
      continue;
    const name = from === stage ? String(stage) : `${from}-${stage}`;
    rows.push([name, countText(parameters), bytesText(bytes), from === stage ? '' : 'each', work(stage)]);
    from = stage + 1;
  }
  const sharedParameters = weights.stages.reduce((sum, { parameters }) => sum + parameters, -weights.parameters);
  const sharedBytes = weights.stages.reduce((sum, { bytes }) => sum + bytes, -weights.bytes);
  // Constants that every layer has are shared as well, and not worth a line.
  const isTied = sharedParameters >= vocabSize;
  const note = isTied ? [`stages share ${bytesText(sharedBytes)}, which is kept once: a tied embedding`] : [];
  return [table([['stage', 'parameters', 'weights', '', 'computes'], ...rows], [1, 2]), ...note].join('\n');
}

function describeEdges(edges: readonly CutEdge[]): string {
  const rows = edges.map(({ name, from, to, bytesPerToken }) => [
    name,
    `${bytesPerToken} B`,
    `${from} -> ${to}`,
    EDGE_NOTES[name],
  ]);
  return table([['edge', 'bytes', 'way', ''], ...rows], [1]);
}

function describeInterconnect(net: Interconnect): string {
  const row = (name: string, { value, origin }: Term, meaning: string): string[] => [
    name,
    Number.isInteger(value) ? String(value) : value.toPrecision(3),
    origin,
    meaning,
  ];
  const rows = [
    row('G', net.groupSize, 'query heads per KV head'),
    row('e', net.elementBytes, 'bytes of one element on the wire, with f16 KV'),
    row('d', net.queryWidth, 'width of q: heads x head_dim'),
    row('L', net.numLayers, 'layers'),
    row('B', net.batch, 'requests that decode together (--batch)'),
    row('l', net.context, 'tokens of each of them (--context)'),
    row('alpha', net.alpha, 'share of the compute time that transfers may add (--alpha)'),
    row('MTIME', net.mtimeMs, `ms, dense stages of one step (--mtime-ms)${estimate(net.mtimeMs)}`),
    row('ATIME', net.atimeMs, `ms, attention of one step (--atime-ms)${estimate(net.atimeMs)}`),
  ];
  const bits = (net.minBytesPerSecond * 8) / 1e6;
  const rate = bits >= 1000 ? `${(bits / 1000).toPrecision(3)} Gbit/s` : `${bits.toPrecision(3)} Mbit/s`;
  return [
    'minimum interconnect bandwidth, (2 + 2/G) e d B L / (alpha (MTIME + ATIME))   [arXiv 2405.01814, section 3.1]',
    '',
    table(rows, [1]),
    '',
    `${bytesText(net.bytesPerStep)} per step: at least ${bytesText(net.minBytesPerSecond)}/s (${rate})`,
  ].join('\n');
}

function estimate({ origin }: Term): string {
  return origin === 'assumed' ? '; estimated for one core with AVX2, measure yours' : '';
}
