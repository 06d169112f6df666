/**
 * Owns `lamina model inspect`: the same values for people or as JSON on stdout.
 */
import { type Environment, findWeights, modelNameOf } from './find-model.ts';
import { describeInspection } from './inspect-text.ts';
import { type InspectOptions, inspectModel } from './inspection.ts';

export interface InspectFlags extends InspectOptions {
  readonly weights?: string;
  readonly json?: true;
}

export async function runInspect(
  name: string | undefined,
  flags: InspectFlags,
  environment: Environment,
): Promise<number> {
  const model = await findWeights(modelNameOf(name, environment), flags.weights, environment);
  const inspection = await inspectModel(model.dir, model, flags);
  process.stdout.write(flags.json ? `${JSON.stringify(inspection, null, 2)}\n` : `${describeInspection(inspection)}\n`);
  return 0;
}
