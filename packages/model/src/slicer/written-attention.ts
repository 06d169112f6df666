/**
 * Owns finding and replacing attention whose cache is joined outside of an operator: written out as products and a
 * softmax, or a fused operator that is given K and V of all tokens.
 *
 * Invariants
 * 1. It is found by what flows: what comes from the cache is followed until two such values meet, the weights and V.
 * 2. Its region takes exactly Q, new K and new V from the tokens (the minimum cut says the same), anything else that it
 *    takes can be evaluated, and what it computes is checked by calculation (attention-fit.ts).
 */
import { reasonOf } from '../model-error.ts';
import { checkOperand, fitAttention, type Head, type Region } from './attention-fit.ts';
import { factsOf, laid, readMaskInput, replaceBySite, type SearchContext } from './attention-operators.ts';
import { type AttentionSite, type Laid, SiteBuilder, type SiteFacts } from './attention-site.ts';
import { type GraphNode, integerAttribute, SUPPORTED_FORMS } from './decoder-graph.ts';
import { checkMinimumCut } from './minimum-cut.ts';
import { roleOf } from './samples.ts';

/** Replaces every attention over a cache that is joined in the graph. */
export function replaceWritten(context: SearchContext): AttentionSite[] {
  const { graph, run } = context;
  const caches = new Set(graph.inputs.filter((input) => roleOf(graph, input) === 'cache').map(({ name }) => name));
  const fromCache = new Set(caches);
  const sites: AttentionSite[] = [];
  for (const node of [...graph.nodes]) {
    const cached = node.inputs.filter((input) => fromCache.has(input));
    if (cached.length === 0 || isSite(node)) continue;
    const kind = node.domain === '' ? node.opType : `${node.domain}.${node.opType}`;
    const isFused = kind === 'com.microsoft.MultiHeadAttention' || kind === 'Attention';
    if (isFused || (kind === 'MatMul' && cached.length === 2)) {
      sites.push(isFused ? replaceFused(context, node, fromCache) : replaceProducts(context, node, fromCache));
      continue;
    }
    for (const output of node.outputs) {
      const value = output === '' ? undefined : run.evaluation.find(output);
      if (output !== '' && (value === undefined || value.numbers() === null)) fromCache.add(output);
    }
  }
  return sites;
}

const isSite = (node: GraphNode): boolean => node.domain === 'lamina';

/** Nodes that make `output` of what is from the cache, in topological order. */
function regionNodes({ graph }: SearchContext, end: GraphNode, fromCache: ReadonlySet<string>): GraphNode[] {
  const found = new Set<GraphNode>([end]);
  const open = [end];
  for (let node = open.pop(); node !== undefined; node = open.pop()) {
    for (const input of node.inputs) {
      const maker = fromCache.has(input) ? graph.maker(input) : undefined;
      if (maker === undefined || found.has(maker)) continue;
      found.add(maker);
      open.push(maker);
    }
  }
  return graph.nodes.filter((node) => found.has(node));
}

/** The Concat that appends new rows to the cache, on the way back from `operand`. */
function joinOf(context: SearchContext, operand: string, fromCache: ReadonlySet<string>, end: GraphNode): Join {
  const { graph } = context;
  const seen = new Set<string>();
  const open = [operand];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    if (seen.has(name)) continue;
    seen.add(name);
    const maker = graph.maker(name);
    if (maker === undefined || !fromCache.has(name)) continue;
    const [past = '', own = ''] = maker.inputs;
    if (maker.opType === 'Concat' && maker.inputs.length === 2 && fromCache.has(past) && !fromCache.has(own)) {
      return { past, own };
    }
    open.push(...maker.inputs);
  }
  throw graph.refuse(end, 'no Concat appends new rows to its cache', SUPPORTED_FORMS);
}

interface Join {
  readonly past: string;
  readonly own: string;
}

/** Values that the region takes from outside and that cannot be evaluated: they come from the tokens. */
function entriesOf({ run }: SearchContext, nodes: readonly GraphNode[], fromCache: ReadonlySet<string>): string[] {
  const made = new Set(nodes.flatMap((node) => node.outputs));
  const taken = new Set(nodes.flatMap((node) => node.inputs));
  return [...taken].filter((name) => {
    if (name === '' || made.has(name) || fromCache.has(name)) return false;
    const value = run.evaluation.find(name);
    return value === undefined || value.numbers() === null;
  });
}

function headOf(context: SearchContext, end: GraphNode, key: Laid, value: Laid, numHeads: number): Head {
  const [numKvHeads = 0, tokens = 0, headDim = 0] = key.dims.slice(-3);
  const isPlain = tokens === context.run.sample.tokens && key.dims.slice(-3).join() === value.dims.slice(-3).join();
  if (!isPlain || numHeads % numKvHeads !== 0) {
    const problem = `K [${key.dims}] and V [${value.dims}] are not [batch, heads, tokens, head size]`;
    throw context.graph.refuse(end, problem, SUPPORTED_FORMS);
  }
  return { numHeads, numKvHeads, headDim };
}

function replaceProducts(context: SearchContext, end: GraphNode, fromCache: ReadonlySet<string>): AttentionSite {
  const { graph, run, longRun } = context;
  const nodes = regionNodes(context, end, fromCache);
  const [weights = '', values = ''] = end.inputs;
  const valueJoin = joinOf(context, values, fromCache, end);
  const keyJoin = joinOf(context, weights, fromCache, end);
  const softmax = nodes.find((node) => node.opType === 'Softmax');
  const product = nodes.find((node) => node.opType === 'MatMul' && node !== end);
  const entries = entriesOf(context, nodes, fromCache);
  const query = entries.find((name) => name !== keyJoin.own && name !== valueJoin.own);
  const isPlain = entries.includes(keyJoin.own) && entries.includes(valueJoin.own) && entries.length === 3;
  if (!isPlain || query === undefined || softmax === undefined || product === undefined) {
    const found = entries.map((name) => `'${name}'`).join(', ');
    throw graph.refuse(end, `attention takes ${found} from the tokens, not Q, K and V`, SUPPORTED_FORMS);
  }
  const [queryLaid, key, value] = [laid(context, query), laid(context, keyJoin.own), laid(context, valueJoin.own)];
  const head = headOf(context, end, key, value, queryLaid.dims.at(-3) ?? 0);
  checkMinimumCut(context, nodes, end, [query, keyJoin.own, valueJoin.own]);
  const region: Region = {
    nodes,
    query,
    newKey: keyJoin.own,
    newValue: valueJoin.own,
    pastKey: keyJoin.past,
    pastValue: valueJoin.past,
    scores: product.outputs[0] ?? '',
    logits: softmax.inputs[0] ?? '',
    output: end.outputs[0] ?? '',
    tanhs: nodes.filter((node) => node.opType === 'Tanh').map((node) => node.outputs[0] ?? ''),
  };
  const facts = fitted(context, end, () => fitAttention(graph, region, [run, longRun], head));
  return replaceEnd(context, end, [queryLaid, key, value], facts);
}

function fitted<T>({ graph }: SearchContext, end: GraphNode, fit: () => T): T {
  try {
    return fit();
  } catch (error) {
    throw graph.refuse(end, reasonOf(error), SUPPORTED_FORMS);
  }
}

function replaceEnd(context: SearchContext, end: GraphNode, parts: readonly Laid[], facts: SiteFacts): AttentionSite {
  const builder = new SiteBuilder(context.graph, end);
  const [query = '', key = '', value = ''] = parts.map((part) => builder.rows(part, context.run.sample.tokens));
  return replaceBySite(context, end, builder, { query, key, value }, facts);
}

/** A fused operator without a cache of its own: K and V are joined, and repeated for the heads, before it. */
function replaceFused(context: SearchContext, end: GraphNode, fromCache: ReadonlySet<string>): AttentionSite {
  const { graph, run } = context;
  const isStandard = end.domain === '';
  const nodes = regionNodes(context, end, fromCache).filter((node) => node !== end);
  const [query = '', keys = '', values = ''] = end.inputs;
  const [keyJoin, valueJoin] = [joinOf(context, keys, fromCache, end), joinOf(context, values, fromCache, end)];
  const queryLaid = laid(context, query);
  const [key, value] = [laid(context, keyJoin.own), laid(context, valueJoin.own)];
  const isRows = queryLaid.dims.length === 3;
  if (!isStandard && (end.inputs[3] ?? '') !== '')
    throw graph.refuse(end, 'a bias after the cache is not supported', SUPPORTED_FORMS);
  const headsAttribute = isStandard ? 'q_num_heads' : 'num_heads';
  const numHeads = isRows ? integerAttribute(end, headsAttribute, 0) : (queryLaid.dims[1] ?? 0);
  const head = headOf(context, end, key, value, numHeads);
  const operandHeads = isRows && isStandard ? integerAttribute(end, 'kv_num_heads', 0) : isRows ? numHeads : undefined;
  const keyHeads = operandHeads ?? run.evaluation.value(keys).dims[1] ?? 0;
  const region: Region = {
    nodes,
    query,
    newKey: keyJoin.own,
    newValue: valueJoin.own,
    pastKey: keyJoin.past,
    pastValue: valueJoin.past,
    scores: '',
    logits: '',
    output: '',
    tanhs: [],
  };
  fitted(context, end, () => {
    const operandHead = { ...head, numHeads: keyHeads };
    checkOperand(graph, region, keys, 'key', run, operandHead, isRows);
    checkOperand(graph, region, values, 'value', run, operandHead, isRows);
  });
  // Without a cache of its own an operator takes its first query for the first token.
  if (integerAttribute(end, isStandard ? 'is_causal' : 'unidirectional', 0) === 1) {
    throw graph.refuse(end, 'is causal by itself, but its cache is joined before it', SUPPORTED_FORMS);
  }
  const mask = readMaskInput(context, end, end.inputs[isStandard ? 3 : 5] ?? '', numHeads, false);
  return replaceEnd(context, end, [queryLaid, key, value], factsOf(end, head, mask));
}
