/**
 * Owns the one choice by length that decoders have: rotary tables that an If takes for long requests and others for
 * short ones, as onnxruntime-genai's builder writes longrope (Phi-3, Phi-3.5, Phi-4 mini):
 *
 *   attention_mask -> Shape -> Gather -> Greater(original length) -> If -> cos_cache, sin_cache
 *
 * Invariants
 * 1. The tables become one, long rows first: a short request's positions are fed with an offset, and so choose its rows
 *    (ModelDescription.shortSequences). Requests of both kinds run in one wave.
 * 2. Positions are used for nothing but looking rows up in such tables: anything else would see the offset.
 * 3. From where on a request is long is read off by evaluating the condition, however it is written.
 */
import { type DecoderGraph, type GraphNode, integerAttribute } from './decoder-graph.ts';
import type { PublishedTensor } from './onnx-file.ts';
import { evaluateSample, roleOf, type Sample } from './samples.ts';
import { readTensorBytes } from './tensor-bytes.ts';

/** Requests of at most `numTokens` tokens, all told, are fed `offset` + position as position ids. */
export interface ShortSequences {
  readonly numTokens: number;
  readonly offset: number;
}

const REMEDY = 'use the checkpoint itself, or an export whose only If chooses rotary tables by length (docs/models.md)';
/** What only lays positions out anew. */
const LAYOUT = new Set(['Reshape', 'Squeeze', 'Unsqueeze', 'Cast']);

/**
 * Replaces every choice of the graph by tables; null if none depends on the length.
 * @throws LaminaError `model_invalid` that names the node of a choice of another kind.
 */
export function joinChosenTables(graph: DecoderGraph, contextLength: number): ShortSequences | null {
  const joined = new Set<string>();
  let found: (ShortSequences & { readonly node: GraphNode }) | undefined;
  for (const choice of graph.choices) {
    const { node } = choice;
    const { numTokens, isThenLong } = thresholdOf(graph, node, contextLength);
    const [long, short] = isThenLong ? [choice.thenTables, choice.elseTables] : [choice.elseTables, choice.thenTables];
    for (const [i, output] of node.outputs.entries()) {
      const [longTable, shortTable] = [tableOf(graph, node, long[i]), tableOf(graph, node, short[i])];
      if (numTokens === contextLength) {
        graph.initializers.set(output, { ...shortTable, name: output });
        continue;
      }
      checkFit(graph, node, longTable, shortTable, contextLength, numTokens);
      const offset = longTable.dims[0] ?? 0;
      if (found !== undefined && (found.numTokens !== numTokens || found.offset !== offset)) {
        throw graph.refuse(node, `chooses at another length than '${found.node.name}', or longer tables`, REMEDY);
      }
      found = { numTokens, offset, node };
      joined.add(output);
      graph.initializers.set(output, {
        name: output,
        dataType: longTable.dataType,
        dims: [offset + (shortTable.dims[0] ?? 0), longTable.dims[1] ?? 0],
        source: Buffer.concat([readTensorBytes(longTable), readTensorBytes(shortTable)]),
      });
    }
    graph.replace(node, []);
    for (const name of [...long, ...short]) if (graph.users(name).length === 0) graph.initializers.delete(name);
  }
  if (found === undefined) return null;
  checkUses(graph, joined);
  const { numTokens, offset } = found;
  return { numTokens, offset };
}

/** Longest request for which the condition is as for one token; `contextLength` if it never changes. */
function thresholdOf(
  graph: DecoderGraph,
  node: GraphNode,
  contextLength: number,
): { numTokens: number; isThenLong: boolean } {
  const nodes = ancestorsOf(graph, node);
  const holds = (sample: Sample): boolean => {
    const condition = evaluateSample(graph, sample, new Map(), nodes)
      .value(node.inputs[0] ?? '')
      .numbers();
    if (condition?.length !== 1) {
      throw graph.refuse(node, 'its condition does not follow from the length of the request', REMEDY);
    }
    return condition[0] !== 0;
  };
  const ofLength = (total: number): boolean => {
    // One token after a cache, and a whole prompt: the number of tokens alone must not matter.
    const [decode, prefill] = [holds({ tokens: 1, past: total - 1 }), holds({ tokens: total, past: 0 })];
    if (decode !== prefill) {
      throw graph.refuse(node, 'its condition depends on more than the length of the request', REMEDY);
    }
    return decode;
  };
  const whenShort = ofLength(1);
  if (ofLength(contextLength) === whenShort) return { numTokens: contextLength, isThenLong: !whenShort };
  let [short, long] = [1, contextLength];
  while (long - short > 1) {
    const middle = (short + long) >> 1;
    if (ofLength(middle) === whenShort) short = middle;
    else long = middle;
  }
  return { numTokens: short, isThenLong: !whenShort };
}

function ancestorsOf(graph: DecoderGraph, node: GraphNode): GraphNode[] {
  const found = new Set<GraphNode>();
  const open = [...node.inputs];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    const maker = graph.maker(name);
    if (maker === undefined || found.has(maker)) continue;
    found.add(maker);
    open.push(...maker.inputs);
  }
  return graph.nodes.filter((each) => found.has(each));
}

function tableOf(graph: DecoderGraph, node: GraphNode, name = ''): PublishedTensor {
  const tensor = graph.initializers.get(name);
  if (tensor?.dims.length === 2) return tensor;
  throw graph.refuse(node, `chooses '${name}', which is no table [positions, elements]`, REMEDY);
}

function checkFit(
  graph: DecoderGraph,
  node: GraphNode,
  long: PublishedTensor,
  short: PublishedTensor,
  contextLength: number,
  numTokens: number,
): void {
  if (long.dataType !== short.dataType || long.dims[1] !== short.dims[1]) {
    throw graph.refuse(node, `its tables [${long.dims}] and [${short.dims}] do not fit each other`, REMEDY);
  }
  for (const [{ dims }, rows] of [[long, contextLength] as const, [short, numTokens] as const]) {
    if ((dims[0] ?? 0) >= rows) continue;
    throw graph.refuse(node, `its table [${dims}] has too few rows for ${rows} positions`, 'download it again');
  }
}

/** Joined tables are for rotary embedding only, all of it uses them, and positions serve nothing else. */
function checkUses(graph: DecoderGraph, joined: ReadonlySet<string>): void {
  for (const node of graph.nodes) {
    const tables = rotaryTablesOf(node);
    const others = node.inputs.find((input) => joined.has(input) && !tables.includes(input));
    if (others !== undefined) throw graph.refuse(node, `uses '${others}', which is chosen by length`, REMEDY);
    const own = tables.find((table) => !joined.has(table));
    if (own !== undefined) {
      throw graph.refuse(node, `takes '${own}' for all lengths, where other tables are chosen by length`, REMEDY);
    }
  }
  const open = graph.inputs.flatMap((input) => (roleOf(graph, input) === 'positionIds' ? [input.name] : []));
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    for (const node of graph.users(name)) {
      if (rotaryTablesOf(node).length > 0 || node.opType === 'Shape') continue;
      if (!LAYOUT.has(node.opType) || node.inputs[0] !== name) {
        throw graph.refuse(node, `uses positions otherwise than to look up tables chosen by length`, REMEDY);
      }
      open.push(...node.outputs);
    }
  }
}

/** cos and sin of a node that rotates; none of another. */
function rotaryTablesOf(node: GraphNode): string[] {
  const { opType, domain, inputs } = node;
  const at = (...indices: readonly number[]): string[] => indices.map((i) => inputs[i] ?? '');
  if (opType === 'RotaryEmbedding') return domain === '' ? at(1, 2) : at(2, 3);
  const isRotating = opType === 'GroupQueryAttention' && integerAttribute(node, 'do_rotary', 0) === 1;
  return isRotating ? at(7, 8) : [];
}
