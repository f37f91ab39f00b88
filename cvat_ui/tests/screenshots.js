// Makes the README's two pictures from the test page (not from a CVAT), by hand:
//   python -m training.demo_clip --out out/demo                         in the repository's root
//   SAM2_MODEL_ID=micro python local_server.py --port 8070
//   FRAMES=out/demo/frames FUNCTION_URL=http://127.0.0.1:8070 \
//     node cvat_ui/tests/screenshots.js out/demo/shapes.json
//   python -c "import sys; from PIL import Image
//   for name in sys.argv[1:]: Image.open(name).quantize(128).save(name, optimize=True)" \
//     cvat_ui/window.png cvat_ui/result.png                             (smaller files)

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { JOB, shape } from './collections.js';
import { NAME, start } from './harness.js';

const TARGET = 40;
const SHOWN = 14;
const FOLDER = join(import.meta.dirname, '..');
const AREA = { x: 0, y: 0, width: 1000, height: 340 };
const OBJECTS = ['patch', 'star'];

const prompts = JSON.parse(await readFile(process.argv[2]));
const site = await start();
try {
    const page = await site.open();
    await page.waitForFunction((name) => globalThis.testPage.find(name), NAME);
    const shapes = prompts.filter(({ label }) => OBJECTS.includes(label))
        .map(({ type, points }, i) => shape(8 + i, type, points));
    await page.evaluate(async ([job, content]) => {
        const { testPage } = globalThis;
        testPage.openJob(job, { shapes: content });
        await testPage.show(0);
        await testPage.openWindow(0);
    }, [{ ...JOB, stopFrame: TARGET }, shapes]);
    await page.getByRole('button', { name: 'Run' }).click();
    await page.waitForFunction((frame) => document.querySelector('#message')?.textContent
        .startsWith(`Frame ${frame} (`), SHOWN);
    await page.screenshot({ path: join(FOLDER, 'window.png'), clip: AREA });
    await page.waitForSelector('dialog[data-done]');
    await page.evaluate((frame) => globalThis.testPage.show(frame), SHOWN);
    await page.screenshot({ path: join(FOLDER, 'result.png'), clip: AREA });
} finally {
    await site.close();
}
