/**
 * Owns reading the configuration: flags over environment variables over defaults, checked once at start.
 *
 * Invariants
 * 1. All problems are reported together, each with the flag and the variable that can mend it.
 * 2. A misspelt LAMINA_* variable or flag is a problem, not ignored.
 */
import { parseArgs } from 'node:util';
import { LaminaError } from '@lamina/tensor';
import { type Config, flagOf, LAUNCHER_VARIABLES, SETTINGS, type Service, type SettingName } from './settings.ts';

const NAMES = Object.keys(SETTINGS).filter((name): name is SettingName => Object.hasOwn(SETTINGS, name));

/** The given flags by name; what is no flag of the service, or lacks its value, goes to `problems`. */
function readFlags(argv: readonly string[], service: Service, problems: string[]): Partial<Record<string, string>> {
  const options = Object.fromEntries(
    NAMES.filter((name) => SETTINGS[name].usedBy.some((user) => user === service)).map((name) => [
      flagOf(name),
      { type: 'string' as const },
    ]),
  );
  const flags: Partial<Record<string, string>> = {};
  const unknown: string[] = [];
  // Not strict: parseArgs would stop at the first problem.
  const { tokens } = parseArgs({ args: [...argv], options, strict: false, allowPositionals: true, tokens: true });
  let strayIndex = -1;
  for (const token of tokens) {
    if (token.kind === 'option-terminator') continue;
    if (token.kind === 'positional') {
      // What follows a misspelt flag is its value, and no second problem.
      if (token.index !== strayIndex) unknown.push(`"${token.value}"`);
    } else if (!Object.hasOwn(options, token.name) || !token.rawName.startsWith('--')) {
      unknown.push(token.rawName);
      if (token.inlineValue !== true) strayIndex = token.index + 1;
    } else if (token.value === undefined || (!token.inlineValue && /^-./.test(token.value))) {
      problems.push(`${token.rawName} needs a value; one that starts with "-" is given as ${token.rawName}=VALUE`);
    } else flags[token.name] = token.value;
  }
  if (unknown.length > 0) {
    const known = Object.keys(options).map((flag) => `--${flag}`);
    problems.push(`${unknown.join(', ')}: no flag of ${service}, which takes ${known.join(' ')}`);
  }
  return flags;
}

/**
 * The checked configuration of a service.
 * @throws LaminaError `config_invalid` that lists every problem.
 */
export function readConfig(
  service: Service,
  argv: readonly string[],
  environment: Readonly<Record<string, string | undefined>>,
): Config {
  const problems: string[] = [];
  const flags = readFlags(argv, service, problems);
  const known = new Set<string>([...NAMES.map((name) => SETTINGS[name].env), ...Object.keys(LAUNCHER_VARIABLES)]);
  for (const variable of Object.keys(environment)) {
    if (variable.startsWith('LAMINA_') && !known.has(variable))
      problems.push(`${variable} is no setting of Lamina; see docs/configuration.md`);
  }
  const config: Partial<Record<SettingName, unknown>> = {};
  for (const name of NAMES) {
    const { env, fallback, schema } = SETTINGS[name];
    const flag = flagOf(name);
    const given = flags[flag] ?? (environment[env] || undefined);
    const result = schema.safeParse(given ?? fallback);
    if (result.success) config[name] = result.data;
    else
      problems.push(`--${flag} / ${env}: "${given}" ${result.error.issues.map((issue) => issue.message).join(', ')}`);
  }
  if (problems.length > 0) throw new LaminaError('config_invalid', problems.join('\n'));
  return config as Config;
}

/** The environment of this process; the only reader of process.env. */
export function processEnvironment(): Readonly<Record<string, string | undefined>> {
  return process.env;
}

/** The binary that the launcher script found, else whatever PATH has. */
export function natsServerOf(environment: Readonly<Record<string, string | undefined>>): string {
  return environment.LAMINA_NATS_SERVER || 'nats-server';
}
