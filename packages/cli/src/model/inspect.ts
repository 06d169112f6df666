/**
 * Owns `lamina model inspect`: the same values for people or as JSON on stdout.
 */
import { type Environment, findModel, modelNameOf } from './find-model.ts';
import { describeInspection } from './inspect-text.ts';
import { type InspectOptions, inspectModel } from './inspection.ts';

export interface InspectFlags extends InspectOptions {
  readonly json?: true;
}

export async function runInspect(
  name: string | undefined,
  flags: InspectFlags,
  environment: Environment,
): Promise<number> {
  const dir = await findModel(modelNameOf(name, environment), environment);
  const inspection = await inspectModel(dir, flags);
  process.stdout.write(flags.json ? `${JSON.stringify(inspection, null, 2)}\n` : `${describeInspection(inspection)}\n`);
  return 0;
}
