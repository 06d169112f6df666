/**
 * Owns evaluating a decoder graph without its weights: the shape of every value for a given number of tokens, and the
 * numbers of those that depend on nothing but shapes, positions and small constants (masks, shapes, rotary angles).
 *
 * Invariants
 * 1. A value that cannot be evaluated is an error only when it is asked for: much of a graph falls away when it is cut.
 */
import { reasonOf } from '../model-error.ts';
import type { DecoderGraph, GraphNode } from './decoder-graph.ts';
import { SUPPORTED_FORMS } from './decoder-graph.ts';
import { elementsOf } from './element-types.ts';
import { ELEMENTWISE_RULES } from './evaluate-elementwise.ts';
import { LAYOUT_RULES } from './evaluate-layout.ts';
import { LINEAR_RULES } from './evaluate-linear.ts';
import type { PublishedTensor } from './onnx-file.ts';
import { Operands, type Rule } from './operands.ts';
import { readTensorBytes } from './tensor-bytes.ts';
import { lazyValue, type Value } from './values.ts';

const RULES: ReadonlyMap<string, Rule> = new Map([
  ...Object.entries(ELEMENTWISE_RULES),
  ...Object.entries(LAYOUT_RULES),
  ...Object.entries(LINEAR_RULES),
]);

export class Evaluation {
  readonly #graph: DecoderGraph;
  readonly #values = new Map<string, Value>();
  /** Of values that cannot be evaluated: the node at which it began, and why. */
  readonly #problems = new Map<string, Problem>();

  /** @param feeds Values of the graph's inputs; nodes whose outputs are among them are not evaluated. */
  constructor(graph: DecoderGraph, feeds: ReadonlyMap<string, Value>, nodes: readonly GraphNode[] = graph.nodes) {
    this.#graph = graph;
    for (const [name, value] of feeds) this.#values.set(name, value);
    for (const node of nodes) this.#evaluate(node);
  }

  /** Throws model_invalid if the value cannot be evaluated. */
  value(name: string): Value {
    const value = this.find(name);
    if (value !== undefined) return value;
    const problem = this.#problems.get(name);
    if (problem === undefined)
      throw this.#graph.refuse(undefined, `'${name}' is not made by any node`, SUPPORTED_FORMS);
    throw this.#graph.refuse(problem.node, problem.text, SUPPORTED_FORMS);
  }

  find(name: string): Value | undefined {
    const value = this.#values.get(name);
    if (value !== undefined) return value;
    const tensor = this.#graph.initializers.get(name);
    if (tensor === undefined) return undefined;
    const made = initializerValue(tensor);
    this.#values.set(name, made);
    return made;
  }

  #evaluate(node: GraphNode): void {
    if (node.outputs.every((output) => output === '' || this.#values.has(output))) return;
    const rule = RULES.get(node.domain === '' ? node.opType : `${node.domain}.${node.opType}`);
    const missing = node.inputs.find((name) => name !== '' && this.find(name) === undefined);
    if (missing !== undefined) {
      this.#fail(node, this.#problems.get(missing) ?? { node, text: `nothing makes its input '${missing}'` });
      return;
    }
    try {
      if (rule === undefined) throw new TypeError('the operator is not supported');
      const inputs = node.inputs.map((name) => (name === '' ? undefined : this.find(name)));
      const outputs = rule(new Operands(node, inputs, this.#graph.opset(node.domain)));
      for (const [i, name] of node.outputs.entries()) {
        const value = outputs[i];
        if (name !== '' && value !== undefined && !this.#values.has(name)) this.#values.set(name, value);
      }
    } catch (error) {
      this.#fail(node, { node, text: reasonOf(error) });
    }
  }

  #fail(node: GraphNode, problem: Problem): void {
    for (const output of node.outputs) this.#problems.set(output, problem);
  }
}

interface Problem {
  readonly node: GraphNode;
  readonly text: string;
}

const initializerValues = new WeakMap<PublishedTensor, Value>();

function initializerValue(tensor: PublishedTensor): Value {
  const cached = initializerValues.get(tensor);
  if (cached !== undefined) return cached;
  const value = lazyValue(tensor.dataType, tensor.dims, () => elementsOf(tensor.dataType, readTensorBytes(tensor)));
  initializerValues.set(tensor, value);
  return value;
}
