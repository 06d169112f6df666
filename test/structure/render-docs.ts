/** Renders the parts of docs/ that are generated from the code. */
import { ENDPOINTS, EVENTS, permissionsOf, ROLES, SERVICE_NAMES, STREAMS, SUBJECT_NOTES } from '@lamina/protocol';
import { flagOf, HUB_VARIABLES, LAUNCHER_VARIABLES, SERVICES, SETTINGS, type SettingName } from '@lamina/runtime';
import { ERROR_CODES } from '@lamina/tensor';
import type { AnyStateNode } from 'xstate';
import { requestMachine } from '../../services/dense-executor/src/request/machine.ts';

const GENERATED = '<!-- Generated from the code; `npm test -- -u` writes it again. -->';

const cell = (text: string): string => text.replaceAll('|', '\\|').replaceAll('\n', ' ');

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string => `| ${cells.map(cell).join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line)].join('\n');
}

export function renderSubjects(): string {
  const endpoints = Object.values(ENDPOINTS).map((entry) => [
    `\`${entry.subject}\``,
    entry.from,
    entry.to,
    entry.meaning,
  ]);
  const events = Object.values(EVENTS).map((entry) => [`\`${entry.subject}\``, entry.from, entry.to, entry.meaning]);
  const notes = SUBJECT_NOTES.map((entry) => [`\`${entry.subject}\``, entry.kind, entry.from, entry.to, entry.meaning]);
  const streams = Object.values(STREAMS).map((entry) => [
    `\`${entry.name}\``,
    entry.subjects.map((subject) => `\`${subject}\``).join(', '),
    entry.meaning,
  ]);
  const code = (subjects: readonly string[]): string => subjects.map((subject) => `\`${subject}\``).join(' ');
  const permissions = ROLES.map((role) => {
    const { publish, subscribe } = permissionsOf(role);
    return [role, code(publish), code(['_INBOX.<user>.>', ...subscribe])];
  });
  return `# Subjects

${GENERATED}

Every NATS subject of Lamina. The table in \`packages/protocol/src/subjects.ts\` is the only place that spells them.

## Clients, queue and tensor plane

${table(['subject', 'kind', 'from', 'to', 'meaning'], notes)}

## JetStream streams

${table(['stream', 'subjects', 'meaning'], streams)}

## Control plane: requests

Msgpack maps, checked against a schema by the receiver, answered with \`{ok: ...}\` or \`{error: {code, message}}\`.

${table(['subject', 'from', 'to', 'meaning'], endpoints)}

## Control plane: events

${table(['subject', 'from', 'to', 'meaning'], events)}

## Micro services

Every process answers \`$SRV.PING\`, \`$SRV.INFO\` and \`$SRV.STATS\` under ${Object.values(SERVICE_NAMES)
    .map((name) => `\`${name}\``)
    .join(', ')}.

## Permissions

What the NATS user of each role may do where nats-server has users ([security.md](security.md)); \`lamina nats users\` writes it
as configuration. It follows from the tables above: \`from\` publishes, \`to\` subscribes.

${table(['role', 'may publish', 'may subscribe'], permissions)}
`;
}

export function renderConfiguration(): string {
  const names = Object.keys(SETTINGS).filter((name): name is SettingName => Object.hasOwn(SETTINGS, name));
  const machineDependent = new Map<SettingName, string>([
    ['intraOpThreads', 'half the cores'],
    ['attentionThreads', 'all cores'],
  ]);
  const rows = names.map((name) => {
    const { env, fallback, meaning, usedBy } = SETTINGS[name];
    const users = usedBy.length === SERVICES.length ? 'all' : usedBy.join(', ');
    return [`\`${env}\``, `\`--${flagOf(name)}\``, machineDependent.get(name) ?? `\`${fallback}\``, users, meaning];
  });
  const hub = Object.entries(HUB_VARIABLES).map(([name, meaning]) => [`\`${name}\``, meaning]);
  const launcher = Object.entries(LAUNCHER_VARIABLES).map(([name, meaning]) => [`\`${name}\``, meaning]);
  return `# Configuration

${GENERATED}

Flags win over environment variables, those over defaults. A service checks everything at start and reports all problems
together; a misspelt \`LAMINA_*\` variable is a problem, not ignored.

${table(['variable', 'flag', 'default', 'used by', 'meaning'], rows)}

## The hub

${table(['variable', 'meaning'], hub)}

## Launcher, compose and tests

${table(['variable', 'meaning'], launcher)}
`;
}

export function renderErrors(): string {
  const rows = Object.entries(ERROR_CODES).map(([code, facts]) => [
    `\`${code}\``,
    String(facts.httpStatus),
    facts.retryable ? 'yes' : 'no',
    facts.meaning,
  ]);
  return `# Error codes

${GENERATED}

The closed set of codes in \`error.code\` of a last token message, in HTTP bodies and in the last line of a process that could not start.
Retryable means: the same request may succeed later without being changed.

${table(['code', 'HTTP', 'retryable', 'meaning'], rows)}
`;
}

function eventLabel(event: string): string {
  if (event.startsWith('xstate.done.actor')) return 'allocated';
  if (event.startsWith('xstate.error.actor')) return 'refused';
  if (event.startsWith('xstate.after')) return 'deadline';
  return event === '' ? '' : event;
}

function guardLabel(guard: unknown): string {
  return typeof guard === 'string' ? ` [${guard}]` : '';
}

/** The request machine as a Mermaid state diagram. */
export function renderStateChart(): string {
  const name = (node: AnyStateNode): string => node.path.join('_');
  const lines: string[] = ['stateDiagram-v2'];
  const edges: string[] = [];
  const visit = (node: AnyStateNode, indent: string): void => {
    for (const child of Object.values(node.states)) {
      lines.push(`${indent}state "${child.key}" as ${name(child)}`);
      if (Object.keys(child.states).length > 0) {
        lines.push(`${indent}state ${name(child)} {`);
        lines.push(`${indent}  [*] --> ${name(child.initial.target[0]!)}`);
        visit(child, `${indent}  `);
        lines.push(`${indent}}`);
      }
      for (const [event, transitions] of child.transitions) {
        for (const { target, guard } of transitions) {
          for (const to of target ?? [])
            edges.push(`  ${name(child)} --> ${name(to)}: ${eventLabel(event)}${guardLabel(guard)}`);
        }
      }
      for (const { target, guard } of child.always ?? []) {
        for (const to of target ?? [])
          edges.push(`  ${name(child)} --> ${name(to)}${guardLabel(guard) === '' ? '' : `:${guardLabel(guard)}`}`);
      }
      if (child.type === 'final') edges.push(`  ${name(child)} --> [*]`);
    }
  };
  lines.push(`  [*] --> ${name(requestMachine.root.initial.target[0]!)}`);
  visit(requestMachine.root, '  ');
  return [...lines, ...edges].join('\n');
}
