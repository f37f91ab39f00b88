import js from '@eslint/js';
import globals from 'globals';

const rules = {
    ...js.configs.recommended.rules,
    'no-unused-vars': ['error', { ignoreRestSiblings: true }],
    eqeqeq: 'error',
    'no-var': 'error',
    'prefer-const': 'error',
    'no-shadow': 'error',
    'max-len': ['off'],
};

export default [
    {
        files: ['sam2_tracker_action.js'],
        languageOptions: { sourceType: 'script', globals: globals.browser },
        rules,
    },
    {
        files: ['tests/page/**/*.js'],
        languageOptions: { sourceType: 'script', globals: globals.browser },
        rules,
    },
    {
        files: ['*.config.js', 'tests/*.js'],
        languageOptions: { globals: { ...globals.node, ...globals.browser } },
        rules,
    },
];
