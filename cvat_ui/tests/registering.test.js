// How the action gets into the window's list: one per tracker function, whenever it appears.

import assert from 'node:assert/strict';
import { after, before, beforeEach, test } from 'node:test';
import { NAME, start } from './harness.js';

let site;
let cvat;

before(async () => {
    site = await start();
    cvat = site.cvat;
});
after(() => site.close());
beforeEach(() => cvat.reset());

const names = (page) => page.evaluate(() => globalThis.testPage.actionNames());
const listed = (page, expected) => page.waitForFunction(
    (all) => JSON.stringify(globalThis.testPage.actionNames()) === JSON.stringify(all), expected,
);
/** Go elsewhere in the one-page application, and wait until the script has asked again. */
async function navigate(page, path) {
    const { lists } = cvat;
    await page.evaluate((to) => window.history.pushState(null, '', to), path);
    await page.waitForFunction(() => true);
    while (cvat.lists === lists) {
        await page.evaluate(() => new Promise(requestAnimationFrame));
    }
}

test('trackers are registered, other functions are not', async () => {
    const page = await site.open();
    await listed(page, [NAME]);
});

test('a core that appears after the script is waited for', async () => {
    const page = await site.open('/tasks?core=late');
    await listed(page, [NAME]);
});

test('before the login nothing is listed; the login page is not even asked from', async () => {
    cvat.loggedIn = false;
    const page = await site.open('/auth/login');
    await page.waitForFunction(() => globalThis.testPage.events.length > 5); // it has looked
    assert.equal(cvat.lists, 0);
    await navigate(page, '/tasks'); // a page that still shows, with a session that has ended
    assert.deepEqual(await names(page), []);

    cvat.loggedIn = true;
    await navigate(page, '/tasks/4/jobs/4');

    await listed(page, [NAME]);
});

test('functions that come and go are followed, and none is registered twice', async () => {
    const [tracker, detector] = cvat.functions;
    const page = await site.open();
    await listed(page, [NAME]);
    const toy = { ...tracker, id: 'toy', name: 'Toy tracker' };
    cvat.functions = [tracker, detector, toy];
    await navigate(page, '/tasks/4/jobs/5');
    await listed(page, [NAME, 'Toy tracker']);
    await navigate(page, '/tasks/4/jobs/6');
    cvat.functions = [detector, toy];
    await navigate(page, '/tasks/4/jobs/7');
    await listed(page, ['Toy tracker']);
    cvat.functions = [tracker, toy];
    await navigate(page, '/tasks/4/jobs/8');
    await listed(page, ['Toy tracker', NAME]);

    const asked = await page.evaluate(() => globalThis.testPage.registrations);
    assert.deepEqual(asked, [NAME, 'Toy tracker', NAME]);
    assert.deepEqual(page.said, []);
});

test('a newly deployed function appears within a minute on the same page', async () => {
    const [tracker] = cvat.functions;
    const page = await site.open();
    await listed(page, [NAME]);
    cvat.functions = [tracker, { ...tracker, id: 'toy', name: 'Toy tracker' }];
    await page.evaluate(() => {
        const now = performance.now.bind(performance);
        performance.now = () => now() + 60_000; // a minute goes by
    });

    await listed(page, [NAME, 'Toy tracker']);
});

test('a list that fails for a while takes nothing away', async () => {
    const page = await site.open();
    await listed(page, [NAME]);
    cvat.loggedIn = false;
    await navigate(page, '/tasks/4/jobs/5');
    await navigate(page, '/tasks/4/jobs/6');

    assert.deepEqual(await names(page), [NAME]);
});

test('two functions of one name are told apart', async () => {
    const [tracker] = cvat.functions;
    cvat.functions = [tracker, { ...tracker, id: 'second' }];
    const page = await site.open();

    await listed(page, [NAME, `${NAME} (second)`]);
});

test('a script that is loaded twice registers once', async () => {
    const page = await site.open();
    await page.addScriptTag({ url: '/sam2_tracker_action.js' });
    await listed(page, [NAME]);
    await navigate(page, '/tasks/4/jobs/5');
    await navigate(page, '/tasks/4/jobs/6');

    assert.deepEqual(await page.evaluate(() => globalThis.testPage.registrations), [NAME]);
});

for (const kind of ['old', 'none']) {
    test(`without the API (core: ${kind}) it says so once and does nothing`, async () => {
        const page = await site.open(`/tasks?core=${kind}`);
        const ours = () => page.said.filter((text) => text.startsWith('SAM 2 tracker:'));
        while (!ours().length) {
            await page.evaluate(() => new Promise(requestAnimationFrame));
        }
        const pauses = () => page.evaluate(() => globalThis.testPage.events.length);
        const counted = await pauses();
        await page.evaluate(() => new Promise(requestAnimationFrame));

        assert.deepEqual(ours(), [
            'SAM 2 tracker: this page has no CVAT with annotation actions; nothing was added.',
        ]);
        assert.equal(await pauses(), counted); // nothing runs on
        assert.equal(cvat.lists, 0);
    });
}
