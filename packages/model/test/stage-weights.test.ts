/** What `inspectDecoder` says of a checkpoint's stages is what the staged graph of that checkpoint has in its leaves. */
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { inspectDecoder } from '../src/inspect-decoder.ts';
import { readModel } from '../src/model-description.ts';
import type { OnnxGraph } from '../src/onnx.ts';
import { Checkpoint } from '../src/safetensors.ts';
import { buildStagedGraph } from '../src/staged-graph.ts';
import { layOutWeights } from '../src/weight-layout.ts';
import { WEIGHT_FORMATS } from '../src/weight-storage.ts';

const TINY = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));

function externalBytes({ initializer }: OnnxGraph): number {
  const lengths = (initializer ?? []).flatMap(({ externalData }) =>
    (externalData ?? []).filter(({ key }) => key === 'length').map(({ value }) => Number(value)),
  );
  return lengths.reduce((a, b) => a + b, 0);
}

function leavesOf(graph: OnnxGraph): OnnxGraph[] {
  const branches = (graph.node ?? []).flatMap(({ attribute }) => (attribute ?? []).flatMap(({ g }) => (g ? [g] : [])));
  return branches.length === 0 ? [graph] : branches.flatMap(leavesOf);
}

describe('the weights of a stage', () => {
  it.each(WEIGHT_FORMATS)('are those of its leaf of the staged graph (%s)', async (format) => {
    const { config } = await readModel(TINY);
    const checkpoint = await Checkpoint.open(TINY);
    const layout = layOutWeights(config!, {
      format,
      activationBits: 8,
      checkpoint,
      locationOf: (path) => path,
      weightsPath: '',
    });
    await checkpoint.close();
    const staged = buildStagedGraph(config!, layout);
    const [first = 0, ...rest] = leavesOf(staged).map(externalBytes);
    const { weights, form } = await inspectDecoder(TINY, { weights: format });
    expect(form).toEqual({ kind: 'checkpoint', weights: format });
    expect(weights.stages.map(({ bytes }) => bytes)).toEqual([first + externalBytes(staged), ...rest]);
  });
});
