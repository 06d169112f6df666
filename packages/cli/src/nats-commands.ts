/** Owns `lamina nats users`: the users of a nats-server as files, for deployments that start their own. */
import { type Command, Option } from 'commander';
import { finish } from './report.ts';

interface UsersFlags {
  readonly out: string;
  readonly client?: readonly string[];
  readonly durableClient?: readonly string[];
  readonly anonymous: 'client' | 'durable-client' | 'none';
}

export function addNatsCommands(command: Command): void {
  command.description('what a nats-server for Lamina needs');
  command
    .command('users')
    .description(
      'write a password for each service and client, and the part of the server configuration that names them',
    )
    .requiredOption(
      '--out <dir>',
      'where <user>/password and nats/users.conf are written; passwords that are there stay',
    )
    .option('--client <name...>', 'users that may send prompts and see nothing but their own inbox')
    .option('--durable-client <name...>', 'users that may also submit durable prompts and read every stored answer')
    .addOption(
      new Option('--anonymous <role>', 'what a connection without a user may do')
        .choices(['client', 'durable-client', 'none'])
        .default('none'),
    )
    .action((flags: UsersFlags) =>
      finish(async () => {
        const { writeNatsUsers } = await import('./nats-users.ts');
        const file = await writeNatsUsers(flags.out, {
          clients: [
            ...(flags.client ?? []).map((name) => ({ name, role: 'client' as const })),
            ...(flags.durableClient ?? []).map((name) => ({ name, role: 'durable-client' as const })),
          ],
          anonymous: flags.anonymous === 'none' ? null : flags.anonymous,
        });
        process.stdout.write(`${file}\n`);
        return 0;
      }),
    );
}
