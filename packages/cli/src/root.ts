/** Owns where this checkout (or installation) lies. */
import { fileURLToPath } from 'node:url';

export const ROOT_DIRECTORY = fileURLToPath(new URL('../../../', import.meta.url));
