/**
 * Owns writing one stage: the nodes that its outputs need, taken from the graph backwards, with their weights.
 *
 * Invariants
 * 1. A stage takes from outside only the staged graph's inputs (staged-graph.ts) and the tables of the outermost graph.
 * 2. Integers that follow from the number of tokens are computed from this stage's own tokens; what would depend on the
 *    length of a cache or on a mask is refused, since a wave has tokens of many requests. So is what changes with the
 *    length of a request.
 */
import { STAGED_INPUTS } from '../staged-graph.ts';
import { type DecoderGraph, type GraphNode, newNode, SUPPORTED_FORMS } from './decoder-graph.ts';
import { bytesOfNumbers, isFloating, TYPE } from './element-types.ts';
import type { Evaluation } from './evaluate.ts';
import type { PublishedTensor } from './onnx-file.ts';
import { POSITIONS, roleOf, type Sample } from './samples.ts';

export interface EvaluatedRuns {
  readonly samples: readonly Sample[];
  readonly evaluations: readonly Evaluation[];
  /** Of a request as long as the context: what is something else there depends on the length of the request. */
  readonly longest: { readonly sample: Sample; readonly evaluation: Evaluation };
}

/** Nodes and tables of the outermost graph, shared by all stages. */
export class SharedTables {
  readonly nodes: GraphNode[] = [];
  readonly initializers = new Map<string, PublishedTensor>();
}

/** What integers follow from: a + b * tokens + c * past, element by element; or the positions themselves. */
type Integers =
  | {
      readonly kind: 'affine';
      readonly dims: readonly number[];
      readonly constant: number[];
      readonly perToken: number[];
    }
  | { readonly kind: 'positions'; readonly dims: readonly number[] }
  | { readonly kind: 'cache' }
  | { readonly kind: 'other' };

/** A table smaller than this is kept in each stage. */
const SHARED_TABLE_BYTES = 4096;
const MAX_INLINE_ELEMENTS = 4096;
const CONSTANT_TYPES: ReadonlySet<number> = new Set([
  TYPE.int64,
  TYPE.int32,
  TYPE.bool,
  TYPE.float,
  TYPE.float16,
  TYPE.double,
]);

export class LeafWriter {
  readonly prefix: string;
  readonly nodes: GraphNode[] = [];
  readonly initializers = new Map<string, PublishedTensor>();
  readonly #graph: DecoderGraph;
  readonly #runs: EvaluatedRuns;
  readonly #shared: SharedTables;
  /** Names here of the graph's values. */
  readonly #names = new Map<string, string>();
  readonly #tokensOf: string;
  #tokens: string | undefined;
  #numFresh = 0;

  /** @param tokensOf A value here whose second dimension is the number of tokens. */
  constructor(graph: DecoderGraph, runs: EvaluatedRuns, shared: SharedTables, prefix: string, tokensOf: string) {
    this.#graph = graph;
    this.#runs = runs;
    this.#shared = shared;
    this.prefix = prefix;
    this.#tokensOf = tokensOf;
  }

  /** Says that a value of the graph is here already, under another name. */
  bind(value: string, name: string): void {
    this.#names.set(value, name);
  }

  add(
    opType: string,
    inputs: readonly string[],
    attributes: Parameters<typeof newNode>[3] = {},
    output = this.#fresh(opType),
  ): string {
    this.nodes.push(newNode(opType, inputs, [output], attributes));
    return output;
  }

  constant(
    values: readonly number[],
    dims: readonly number[] = [values.length],
    dataType: number = TYPE.int64,
  ): string {
    const name = this.#fresh('constant');
    this.initializers.set(name, { name, dataType, dims, source: bytesOfNumbers(dataType, values) });
    return name;
  }

  /** Name here of a value of the graph, which is computed if it is not there yet. */
  emit(value: string): string {
    const known = this.#names.get(value);
    if (known !== undefined) return known;
    const name = this.#make(value);
    this.#names.set(value, name);
    return name;
  }

  #make(value: string): string {
    const tensor = this.#graph.initializers.get(value);
    if (tensor !== undefined) return this.#initializer(value, tensor);
    if (value === POSITIONS) return STAGED_INPUTS.positionIds.name;
    const integers = this.#integers(value);
    this.#checkLongest(value, integers);
    if (integers.kind === 'positions') return this.#positions(value, integers.dims);
    if (integers.kind === 'affine') return this.#affine(value, integers);
    const maker = this.#graph.maker(value);
    if (maker === undefined) throw this.#refuseInput(value);
    if (integers.kind === 'cache') {
      throw this.#graph.refuse(maker, 'depends on the length of the cache outside of attention', SUPPORTED_FORMS);
    }
    return this.#node(maker, value);
  }

  #initializer(value: string, tensor: PublishedTensor): string {
    const isTable = this.#graph.users(value).every((node) => isLookup(node, value));
    if (isTable && tensor.source.byteLength > SHARED_TABLE_BYTES) {
      this.#shared.initializers.set(value, tensor);
      return value;
    }
    const name = `${this.prefix}.${value}`;
    this.initializers.set(name, { ...tensor, name });
    return name;
  }

  #node(node: GraphNode, value: string): string {
    const sliced = this.#tableOfSlice(node);
    if (sliced !== undefined) return this.emit(sliced);
    if (node.opType === 'Cast' && this.#isSharedTable(node)) return this.#sharedCast(node, value);
    const inputs = node.inputs.map((input) => (input === '' ? '' : this.emit(input)));
    const outputs = node.outputs.map((output) => (output === '' ? '' : `${this.prefix}.${output}`));
    for (const [i, output] of node.outputs.entries()) if (output !== '') this.#names.set(output, outputs[i] ?? '');
    this.nodes.push({ ...node, name: `${this.prefix}.${node.name || value}`, inputs, outputs });
    return this.#names.get(value) ?? value;
  }

  /** Tables of which a stage takes the first `past + tokens` rows, to look positions up in: the whole table does as well. */
  #tableOfSlice(node: GraphNode): string | undefined {
    const [data = '', starts = '', ends = ''] = node.inputs;
    if (node.opType !== 'Slice' || !this.#graph.initializers.has(data)) return undefined;
    const isFromStart =
      this.#runs.evaluations[0]
        ?.find(starts)
        ?.numbers()
        ?.every((start) => start === 0) === true;
    return isFromStart && this.#integers(ends).kind === 'cache' ? data : undefined;
  }

  #isSharedTable(cast: GraphNode): boolean {
    const [table = ''] = cast.inputs;
    const tensor = this.#graph.initializers.get(table);
    const isLarge = tensor !== undefined && tensor.source.byteLength > SHARED_TABLE_BYTES;
    return isLarge && this.#graph.users(cast.outputs[0] ?? '').every((node) => isLookup(node, cast.outputs[0] ?? ''));
  }

  #sharedCast(cast: GraphNode, value: string): string {
    const [table = ''] = cast.inputs;
    const tensor = this.#graph.initializers.get(table);
    const to = cast.attributes.get('to')?.i;
    const output = `${table}.as.${String(to)}`;
    if (tensor !== undefined && !this.#shared.nodes.some((node) => node.outputs[0] === output)) {
      this.#shared.initializers.set(table, tensor);
      this.#shared.nodes.push({ ...cast, name: `Cast:${output}`, outputs: [output] });
    }
    return tensor === undefined ? value : output;
  }

  #positions(value: string, dims: readonly number[]): string {
    const { dataType } = this.#first(value);
    const isPlain = dims.length === 2 && dims[0] === 1;
    const { name } = STAGED_INPUTS.positionIds;
    const axis = dims.findIndex((dim) => dim !== 1);
    const shape = dims.map((dim, i) => (i === axis ? -1 : dim));
    const shaped = isPlain ? name : this.add('Reshape', [name, this.constant(shape)]);
    return dataType === TYPE.int64 ? shaped : this.add('Cast', [shaped], { to: dataType });
  }

  #affine(value: string, { dims, constant, perToken }: Integers & { kind: 'affine' }): string {
    const { dataType } = this.#first(value);
    if (perToken.every((factor) => factor === 0)) return this.constant(constant, dims, dataType);
    const scaled = this.add('Mul', [this.#numTokens(), this.constant(perToken)]);
    const sum = this.add('Add', [scaled, this.constant(constant)]);
    const shaped = dims.length === 1 ? sum : this.add('Reshape', [sum, this.constant(dims)]);
    return dataType === TYPE.int64 ? shaped : this.add('Cast', [shaped], { to: dataType });
  }

  /** [1] int64 */
  #numTokens(): string {
    if (this.#tokens === undefined) {
      const shape = this.add('Shape', [this.#tokensOf]);
      this.#tokens = this.add('Gather', [shape, this.constant([1])]);
    }
    return this.#tokens;
  }

  #first(value: string): { readonly dataType: number } {
    const [evaluation] = this.#runs.evaluations;
    if (evaluation === undefined) throw new TypeError('no evaluation');
    return evaluation.value(value);
  }

  /** What a value that can be evaluated follows from; `other` for those that are to be computed as they stand. */
  #integers(value: string): Integers {
    const found = this.#runs.evaluations.map((evaluation) => evaluation.find(value));
    const [first] = found;
    const numbers = found.map((run) => run?.numbers() ?? null);
    if (first === undefined || numbers.some((list) => list === null)) return { kind: 'other' };
    const known = numbers.flatMap((list) => (list === null ? [] : [list]));
    const { samples } = this.#runs;
    const isPositions = known.every((list, run) => {
      const sample = samples[run];
      return sample !== undefined && list.length === sample.tokens && list.every((x, i) => x === sample.past + i);
    });
    if (isPositions) return { kind: 'positions', dims: first.dims };
    const isSameShape = found.every((run) => run?.dims.join() === first.dims.join());
    const isScalar = (known[0]?.length ?? 0) <= 1;
    if (!isSameShape || (known[0]?.length ?? 0) > MAX_INLINE_ELEMENTS) return { kind: 'other' };
    if (!CONSTANT_TYPES.has(first.dataType)) return { kind: 'other' };
    if (isFloating(first.dataType) && !isScalar) return { kind: 'other' };
    return fitIntegers(known, samples, first.dims);
  }

  /** What was read off short requests must hold for the longest too. */
  #checkLongest(value: string, integers: Integers): void {
    if (integers.kind !== 'positions' && integers.kind !== 'affine') return;
    const { sample, evaluation } = this.#runs.longest;
    const numbers = evaluation.find(value)?.numbers();
    if (!numbers) return;
    const { tokens, past } = sample;
    const isSame = numbers.every((x, i) => {
      const expected =
        integers.kind === 'positions' ? past + i : integers.constant[i]! + integers.perToken[i]! * tokens;
      return Math.abs(x - expected) < 1e-6;
    });
    if (isSame) return;
    const problem = `'${value}' depends on the length of the request, in ${this.prefix}`;
    throw this.#graph.refuse(this.#graph.maker(value), problem, SUPPORTED_FORMS);
  }

  #refuseInput(value: string): Error {
    const input = this.#graph.input(value);
    const role = input === undefined ? 'value' : roleOf(this.#graph, input);
    const problem = `a stage needs '${value}' (${role}) outside of attention, in ${this.prefix}`;
    return this.#graph.refuse(this.#graph.users(value)[0], problem, SUPPORTED_FORMS);
  }

  #fresh(label: string): string {
    return `${this.prefix}.lamina.${label}.${this.#numFresh++}`;
  }
}

/** Finds a, b, c with x = a + b * tokens + c * past in all runs. */
function fitIntegers(runs: readonly Float64Array[], samples: readonly Sample[], dims: readonly number[]): Integers {
  const [base, moreTokens, morePast] = runs;
  const [s0, s1, s2] = samples;
  if (!base || !moreTokens || !morePast || !s0 || !s1 || !s2) return { kind: 'other' };
  const perToken = Array.from(base, (x, i) => (moreTokens[i]! - x) / (s1.tokens - s0.tokens));
  const perPast = Array.from(base, (x, i) => (morePast[i]! - x) / (s2.past - s0.past));
  const constant = Array.from(base, (x, i) => x - perToken[i]! * s0.tokens - perPast[i]! * s0.past);
  const fits = runs.every((run, r) =>
    run.every((x, i) => {
      const [tokens, past] = [samples[r]?.tokens ?? 0, samples[r]?.past ?? 0];
      return Math.abs(x - (constant[i]! + perToken[i]! * tokens + perPast[i]! * past)) < 1e-6;
    }),
  );
  if (!fits) return { kind: 'other' };
  if (perPast.some((factor) => factor !== 0)) return { kind: 'cache' };
  const isWhole = perToken.every(Number.isInteger);
  if (perToken.every((factor) => factor === 0)) return { kind: 'affine', dims, constant: Array.from(base), perToken };
  return isWhole ? { kind: 'affine', dims, constant, perToken } : { kind: 'other' };
}

/** A node that looks rows up by position in a table. */
function isLookup(node: GraphNode, table: string): boolean {
  const at = node.inputs.indexOf(table);
  if (node.opType === 'RotaryEmbedding') return at >= 1 && node.inputs.lastIndexOf(table) >= 1;
  return false;
}
